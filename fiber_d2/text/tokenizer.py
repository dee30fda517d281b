"""Loading a tokenizer from a name, a folder or a file, with or without a network."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import RobertaProcessing
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
BUNDLED = {"shapes": Path(__file__).parent / "assets" / "shapes_tokenizer.json"}
# What a special token may be called; the first name that the vocabulary has is taken.
SPECIAL_TOKENS = {
    "bos_token": ("<s>", "[CLS]"),
    "eos_token": ("</s>", "[SEP]"),
    "cls_token": ("<s>", "[CLS]"),
    "sep_token": ("</s>", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "mask_token": ("<mask>", "[MASK]"),
}


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load a tokenizer that knows which characters each token covers.

    Args:
        name_or_path: one of

            - ``"shapes"``, the small byte-level tokenizer that comes with this package;
            - a ``tokenizer.json`` file;
            - a folder with a ``tokenizer.json``, or with RoBERTa's ``vocab.json`` and
              ``merges.txt``;
            - a name on the Hugging Face hub, such as ``"roberta-base"``. The local cache is
              looked at first; the network is used only where it is reachable.

    Raises:
        FileNotFoundError: there is nothing of that name here; says what to download and where to
            put it.
        ValueError: the file is there but is not a tokenizer.
    """
    name = os.fspath(name_or_path)
    if name in BUNDLED and not os.path.exists(name):
        return _from_file(BUNDLED[name])
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path)
    # A hub name has at most one slash and no suffix; anything else was meant as a path.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no tokenizer at {name}: {_remedy(name)}")
    if path.suffix == ".json":
        raise FileNotFoundError(f"There is no tokenizer file {name}: {_remedy(name)}")
    return _from_file(_from_hub(name))


def _remedy(name: str) -> str:
    return (
        "give the path of a tokenizer.json, or of a folder that holds one (or vocab.json and "
        "merges.txt). For the published FIBER models that is tokenizer.json of "
        "https://huggingface.co/FacebookAI/roberta-base; download it on a machine with a network "
        f"and copy it here, then use its path instead of {name!r}. "
        "The name 'shapes' needs no download."
    )


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise ValueError(f"{path} is not a tokenizer.json file: {error}") from error
    return _wrap(backend)


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    if (folder / TOKENIZER_FILE).is_file():
        return _from_file(folder / TOKENIZER_FILE)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise FileNotFoundError(
            f"The folder {folder} holds neither tokenizer.json nor vocab.json and merges.txt: "
            f"{_remedy(str(folder))}"
        )
    ids = json.loads(vocab.read_text(encoding="utf-8"))
    lacking = [token for token in ("<s>", "</s>") if token not in ids]
    if lacking:
        raise ValueError(f"{vocab} is not a RoBERTa vocabulary: it lacks {', '.join(lacking)}.")
    backend = ByteLevelBPETokenizer(str(vocab), str(merges), trim_offsets=True)._tokenizer
    backend.add_special_tokens(
        [names[0] for names in SPECIAL_TOKENS.values() if names[0] in ids],
    )
    backend.post_processor = RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False
    )
    return _wrap(backend)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    # A stored padding or truncation would silently lengthen or cut captions.
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    special = {
        role: next((name for name in names if name in vocabulary), None)
        for role, names in SPECIAL_TOKENS.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{role: name for role, name in special.items() if name}
    )


def _from_hub(name: str) -> Path:
    """Path of the hub's tokenizer.json in the local cache, downloaded where that is possible."""
    try:
        return Path(hf_hub_download(name, TOKENIZER_FILE, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no valid name: the network decides
        reason = _why_unreachable()
    if reason is None:
        try:
            logger.info("Downloading the tokenizer %s", name)
            return Path(hf_hub_download(name, TOKENIZER_FILE, etag_timeout=5))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
    raise FileNotFoundError(
        f"There is no tokenizer {name!r} here, neither as a path nor in the local Hugging Face "
        f"cache, and it cannot be downloaded ({reason}): {_remedy(name)}"
    )


def _why_unreachable() -> str | None:
    """None where the hub answers; asked once, since the hub's client retries for a long time."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT} cannot be reached: {getattr(error, 'reason', error)}"
    return None
