"""Makes the bundled tokenizer, the same every time: python tools/train_tokenizer.py.

It is a byte-level BPE with RoBERTa's special tokens, so every text can be encoded and whatever
works with it works with RoBERTa's own tokenizer. It is trained on captions of the shapes
generator, in all its colours and shapes, and on ``tokenizer_words.txt``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fiber_d2.data.shapes_params import (
    BACKGROUNDS,
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZES,
    ShapesParams,
)
from fiber_d2.data.shapes_write import all_captions

VOCABULARY_SIZE = 2000
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # in the order of their ids
WORDS = Path(__file__).with_name("tokenizer_words.txt")
OUTPUT = Path(__file__).parents[1] / "fiber_d2" / "text" / "assets" / "shapes_tokenizer.json"

# Often enough that the words of the generator come out whole, and rarely enough that the word
# list shares the rest of the vocabulary fairly.
SHAPE_WORD_REPEATS = 400
WORD_REPEATS = 20
NUM_SCENES = 300


def corpus() -> Iterator[str]:
    """The texts to learn from."""
    # Sizes and numbers are fixed here, so that other defaults do not make another tokenizer.
    params = ShapesParams(
        seed=0,
        image_size=64,
        colors=tuple(COLORS),
        shapes=tuple(SHAPES),
        min_objects=3,
        max_objects=6,
        small=(0.13, 0.2),
        large=(0.29, 0.42),
        middle_share=0.15,
        min_visible=0.7,
        twin_share=0.6,
        sentences_per_image=2,
        attributes_per_image=4,
        relations_per_image=6,
    )
    yield from all_captions(params, "train", NUM_SCENES)
    yield from [". ".join(params.class_names)] * 20
    for word in shape_words():
        yield from [f" {word}"] * SHAPE_WORD_REPEATS
    for color in COLORS:  # the first word of a list of classes has no space before it
        yield from [color] * SHAPE_WORD_REPEATS
    for line in WORDS.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            for word in line.split():
                yield from [f" {word}"] * WORD_REPEATS
                yield word


def shape_words() -> list[str]:
    """Words of the generator that must be one token each after a space."""
    words = {*COLORS, *SHAPES, *SHAPES.values(), *SIZES, *NUMBERS.values(), *BACKGROUNDS}
    words.update(word for relation in RELATIONS for word in relation.split())
    return sorted(words | {"the", "a", "an", "and", "shape", "shapes", "background", "."})


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    begin, _, end, _, _ = SPECIAL_TOKENS
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, tokenizer.token_to_id(end)),
        (begin, tokenizer.token_to_id(begin)),
        trim_offsets=True,
        add_prefix_space=False,
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled tokenizer.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    output.write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    print(f"{output}: {tokenizer.get_vocab_size()} entries")


if __name__ == "__main__":
    main()
