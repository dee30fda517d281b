"""Every command in the pages names programs, options, recipes and keys that exist."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from fiber_d2 import cli
from fiber_d2.predictor_settings import find_config

from .conftest import PAGES, REPOSITORY, blocks_of

PROGRAMS = ("fiber-d2", "train_net.py", "python", "make", "torchrun")
# Stand for a file of the reader's.
OWN = re.compile(r"C|(.*/)?[CF]\.(py|yaml)|my_\w+\.py|.*\b[A-Z_]{3,}\b.*|.*\.\.\.")


def commands_of(text):
    """Commands in blocks and in the cells of tables, without comments, continued lines joined."""
    cells = re.findall(r"`((?:fiber-d2|python) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    # Of other commands prose names an option, not all that they need.
    cells = [cell if re.match("fiber-d2 (train|eval)", cell) else f"{cell} ..." for cell in cells]
    blocks = [block.text for block in blocks_of(text) if block.language in ("", "bash", "sh")]
    for line in [*re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines(), *cells]:
        with contextlib.suppress(ValueError):  # an apostrophe of ordinary text
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
                words.pop(0)
            if words and words[0].startswith(".venv/bin/"):
                words[0] = words[0][len(".venv/bin/") :]
            named = words[1:] and words[0] in PROGRAMS
            # A file in a list of files is no command.
            if named and (words[0] != "train_net.py" or words[1].startswith("-")):
                yield words


def collect():
    for page in PAGES:
        for words in commands_of((REPOSITORY / page).read_text(encoding="utf-8")):
            yield page, words
    for path in sorted((REPOSITORY / "configs").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for words in commands_of(docstring):
            yield str(path.relative_to(REPOSITORY)), words
    for text in (cli.EPILOG, cli.TRAIN_EPILOG, cli.EVAL_EPILOG):
        indented = "\n" + text.replace("\n  ", "\n    ").replace("examples:", "examples:\n")
        for words in commands_of(indented):
            yield "fiber_d2/cli.py", words


# The original's own, in docs/migration.md.
THEIRS = ("torch.distributed.launch", "tools/test_grounding_net.py", "tools/finetune.py")
COMMANDS = [
    (page, words)
    for page, words in collect()
    if not any(name in words for name in THEIRS) and not page.endswith("CHANGELOG.md")
]


def parse(parser, words, intermixed=False):
    """The arguments; words that stand for numbers are 1.

    Raises:
        ValueError: what the parser says.
    """
    words = ["1" if word in ("N", "M", "R", "RANK") else word for word in words]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return (parser.parse_intermixed_args if intermixed else parser.parse_args)(words)
    except SystemExit:
        raise ValueError(errors.getvalue()) from None


def check_options(parser, words):
    """Of a synopsis: its options exist."""
    known = {option for action in parser._actions for option in action.option_strings}
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(words)):
        assert option in known, option


def is_synopsis(words):
    return any(re.search(r"^\[|\]$|\w\|\w|^\.\.\.$", word) for word in words)


@functools.cache
def load(config):
    """A LazyConfig; None of a yaml file, and of a recipe that looks for data that are not here."""
    from detectron2.config import CfgNode

    from fiber_d2.engine.overrides import load_config

    try:
        cfg = load_config(config, [])
    except FileNotFoundError as error:
        assert "on disk" in str(error)
        return None
    return None if isinstance(cfg, CfgNode) else cfg


def check_run(words, prog="train_net.py", leading_name=False):
    from fiber_d2.engine.main import build_argument_parser
    from fiber_d2.engine.overrides import check_key

    parser = build_argument_parser(prog)
    if is_synopsis(words):
        return check_options(parser, words)
    if leading_name and words and not words[0].startswith("-"):
        words = ["--config-file", words[0], *words[1:]]
    args = parse(parser, words)
    if OWN.fullmatch(args.config_file):
        return None
    config = load(find_config(args.config_file))
    for text in args.opts if config is not None else ():
        key, equals, _ = text.partition("=")
        assert equals, f"{text} is no key=value"
        if not OWN.fullmatch(key):
            check_key(config, key.lstrip("+"))
    return None


def check_command(words):
    name, rest = words[0] if words and words[0] != "..." else "--help", words[1:]
    assert name in (*cli.COMMANDS, "COMMAND", "--help"), name
    if rest in ([], ["..."]):
        return None
    if name in ("train", "eval"):
        return check_run(rest, f"fiber-d2 {name}", leading_name=True)
    if "--help" in rest or not (REPOSITORY / f"fiber_d2/commands/{name}.py").is_file():
        return None
    if rest[0] == "config" and name == "convert":
        from fiber_d2.original_config.output import build_parser

        return parse(build_parser(), rest[1:], intermixed=True)
    module = importlib.import_module(f"fiber_d2.commands.{name}")
    build_parser = getattr(module, "build_parser", None)
    if build_parser is None:
        return check_source(Path(module.__file__), rest)
    if is_synopsis(rest):
        return check_options(build_parser(), rest) if name != "convert" else None
    args = parse(build_parser(), rest)
    for option in ("config", "config_file"):
        config = getattr(args, option, None)
        assert config is None or OWN.fullmatch(config) or find_config(config)
    return None


def check_source(path, words):
    """Of other programs: their options are somewhere in their source."""
    assert path.is_file(), path
    source = path.read_text(encoding="utf-8")
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(words)):
        assert f'"{option}"' in source, f"{path.name} has no {option}"


def check_module(name, words):
    if name == "fiber_d2":
        return check_command(words)
    if not name.startswith(("fiber_d2", "benchmarks")):
        return None
    path = REPOSITORY.joinpath(*name.split("."))
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert path.is_file(), f"no module {name}"
    if name == "fiber_d2.engine.fewshot":
        from fiber_d2.engine.fewshot import build_argument_parser

        return check_options(build_argument_parser(), words)
    return None


@pytest.mark.parametrize("page", sorted({page for page, _ in COMMANDS}))
def test_commands(page):
    for _, words in (one for one in COMMANDS if one[0] == page):
        try:
            check(words)
        except (AssertionError, ValueError, KeyError, FileNotFoundError) as error:
            pytest.fail(f"{page}: {' '.join(words)}\n{error}")


def check(words):
    program, rest = words[0], words[1:]
    if program == "fiber-d2":
        check_command(rest)
    elif program == "train_net.py":
        check_run(rest)
    elif program == "make":
        makefile = (REPOSITORY / "Makefile").read_text()
        for target in (word for word in rest if re.fullmatch("[a-z-]+", word)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    elif program == "torchrun":
        if "train_net.py" in rest:
            check_run(rest[rest.index("train_net.py") + 1 :])
    elif rest[0] == "-m":
        check_module(rest[1], rest[2:])
    elif rest[0] == "train_net.py":
        check_run(rest[1:])
    elif rest[0].endswith(".py") and rest[0] != "setup.py" and not OWN.fullmatch(rest[0]):
        check_source(REPOSITORY / rest[0], [])


def test_there_are_commands():
    programs = [words[0] for _, words in COMMANDS]
    assert programs.count("fiber-d2") > 40 and programs.count("train_net.py") > 20
    runs = [words[1] for _, words in COMMANDS if words[0] == "fiber-d2"]
    assert {"predict", "train", "eval", "validate", "convert", "info"} <= set(runs)


def test_mistakes_are_found():
    for words in (
        ["fiber-d2", "train", "quickstop"],
        ["fiber-d2", "predict", "a.jpg", "--klasses", "a"],
        ["train_net.py", "--config-file", "configs/quickstart.py", "train.max_iters=3"],
        ["python", "-m", "fiber_d2.engine.few_shot"],
        ["python", "tools/none.py"],
        ["make", "quick-start"],
    ):
        with pytest.raises((AssertionError, ValueError, KeyError, FileNotFoundError)):
            check(words)
