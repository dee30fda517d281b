#!/usr/bin/env python
"""Train the small byte-level BPE tokenizer that ships with the package.

    python tools/train_shapes_tokenizer.py fiber_d2/text/assets/shapes_tokenizer.json

It is the quickstart's tokenizer: every word of the generated data is one token, any other text
falls apart into pieces, and offsets leave spaces out, as RoBERTa's do. Training depends on the
words below alone, so the file comes out the same every time.
"""

from __future__ import annotations

import argparse
import itertools

from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing

from fiber_d2.data.shapes_params import COLORS, NUMBERS, RELATIONS, SHAPES, SIZES, TEXTURES

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
GLUE = "a an the A An The is are and with to of in on at there both two next near by which that it"
PLACES = (
    "left right above below top bottom middle corner side between beside under over upper lower"
)
SIZE_WORDS = "big tiny medium little largest smallest leftmost rightmost"
EVERYDAY = """
person man woman child people bicycle car motorcycle airplane bus train truck boat traffic light
fire hydrant stop sign parking meter bench bird cat dog horse sheep cow elephant bear zebra giraffe
backpack umbrella handbag tie suitcase frisbee ski snowboard sports ball kite baseball bat glove
skateboard surfboard tennis racket bottle wine glass cup fork knife spoon bowl banana apple sandwich
orange broccoli carrot hot dog pizza donut cake chair couch potted plant bed dining table toilet tv
laptop mouse remote keyboard cell phone microwave oven toaster sink refrigerator book clock vase
scissors teddy bear hair drier toothbrush object thing animal vehicle house tree street window
"""


def sentences() -> list[str]:
    """Sentences in which each word stands first and later: with and without a space before it."""
    shapes = [*SHAPES, *SHAPES.values(), "shape", "shapes", "object", "objects"]
    plain = [*GLUE.split(), *PLACES.split(), *SIZE_WORDS.split(), *EVERYDAY.split()]
    plain += [*SIZES, *TEXTURES, *NUMBERS.values(), *itertools.chain(*map(str.split, RELATIONS))]
    own = [*COLORS, *shapes, *plain]
    lines = [f"{word} {word}. {word}, {word}" for word in dict.fromkeys(own)]
    lines += [word.capitalize() for word in dict.fromkeys(own)]
    return lines * 2  # a merge must be seen twice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=1500)
    args = parser.parse_args()
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False, trim_offsets=True)
    tokenizer.train_from_iterator(
        sentences(),
        vocab_size=args.vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        show_progress=False,
    )
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    tokenizer.post_processor = RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.save(args.output)
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
