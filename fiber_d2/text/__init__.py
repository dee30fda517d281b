"""Captions in, tokens and positive maps out."""

from .prompts import build_detection_prompts, build_grounding_prompt, clean_name
from .spans import character_tokens, spans_to_positive_map
from .tokenizer import load_tokenizer

__all__ = [
    "build_detection_prompts",
    "build_grounding_prompt",
    "character_tokens",
    "clean_name",
    "load_tokenizer",
    "spans_to_positive_map",
]
