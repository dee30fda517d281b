"""Prompts against the stored reference captions, and what they must never do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.text import (
    build_detection_prompts,
    build_grounding_prompt,
    clean_name,
    load_tokenizer,
)
from fiber_d2.text.prompts import clean_templates, detection_caption

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data_eval"
REFERENCE = json.loads((FIXTURES / "d_prompts.json").read_text())
TOKENIZER = load_tokenizer(FIXTURES / "tokenizer.json")
LONG = 10_000


@pytest.mark.parametrize(("name", "expected"), REFERENCE["clean_name"])
def test_clean_name(name, expected):
    assert clean_name(name) == expected


@given(st.text(alphabet="a_ ()b"))
@settings(deadline=None)
def test_clean_name_rule_by_rule(name):
    expected = name
    for pattern, replacement in ((r"\(.*\)", ""), ("_", " "), ("  ", " ")):
        expected = re.sub(pattern, replacement, expected)
    assert clean_name(name) == expected


@pytest.mark.parametrize("index", range(len(REFERENCE["eval_prompts"])))
def test_detection_prompts_of_the_reference(index):
    case = REFERENCE["eval_prompts"][index]
    names, ids = case["category_names"], case["category_ids"]
    templates, size = case["caption_prompt"], case["chunk_size"]
    if templates is not None and 0 < size < len(names):
        pytest.fail("the reference counts templates within a chunk; this case cannot be compared")
    prompts = build_detection_prompts(
        TOKENIZER,
        names,
        max_tokens=LONG,
        max_classes=size if size > 0 else None,
        separator=case["separation_tokens"],
        templates=templates,
        suppressed=case["suppress_query"] or (),
        on_empty="keep",
    )
    assert len(prompts) == len(case["expected"])
    for prompt, expected in zip(prompts, case["expected"]):
        assert prompt.text == expected["caption"]
        assert prompt.input_ids.tolist() == expected["input_ids"]
        assert prompt.num_tokens == expected["n_tokens_untruncated"]
        assert prompt.attention_mask.all()
        found = [
            [ids[target], torch.nonzero(row).flatten().tolist()]
            for target, row in zip(prompt.target_ids.tolist(), prompt.positive_map)
            if row.any()
        ]
        assert found == expected["label_to_tokens"]


@pytest.mark.parametrize("index", range(len(REFERENCE["train_simple"])))
def test_training_captions_of_the_reference(index):
    case = REFERENCE["train_simple"][index]
    place = {label: i for i, (label, _) in enumerate(case["ind_to_class"])}
    names = [name for _, name in case["ind_to_class"]]
    options = {
        "separator": case["separation_tokens"],
        "templates": clean_templates(case["caption_prompt"]),
        "lead": "object detection : " if case["add_detection_prompt"] else "",
    }
    (prompt,) = build_detection_prompts(
        TOKENIZER, names, max_tokens=LONG, on_empty="keep", **options
    )
    assert prompt.text == case["expected"]["caption"]
    caption, spans = detection_caption(names, **options)
    assert caption == prompt.text
    found = [[list(spans[place[label]])] for label in case["labels"]]
    assert found == case["expected"]["box_spans"]


NAMES = st.text(alphabet="abc de_.é日-", min_size=1, max_size=12).filter(
    lambda name: clean_name(name).strip()
)


@given(st.lists(NAMES, min_size=1, max_size=25), st.integers(16, 60), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_chunks_are_greedy_complete_and_within_the_limits(names, max_tokens, max_classes):
    cleaned = [clean_name(name) for name in names]

    def length(start, stop):
        return len(TOKENIZER(". ".join(cleaned[start:stop]))["input_ids"])

    if any(length(i, i + 1) > max_tokens for i in range(len(names))):
        with pytest.raises(ValueError, match="alone makes a caption of"):
            build_detection_prompts(TOKENIZER, names, max_tokens=max_tokens, on_empty="keep")
        return
    prompts = build_detection_prompts(
        TOKENIZER, names, max_tokens=max_tokens, max_classes=max_classes, on_empty="keep"
    )
    assert torch.cat([p.target_ids for p in prompts]).tolist() == list(range(len(names)))
    start = 0
    for prompt in prompts:
        stop = start + prompt.num_targets
        assert prompt.text == ". ".join(cleaned[start:stop])
        assert prompt.num_tokens <= max_tokens and prompt.num_targets <= max_classes
        full = prompt.num_targets == max_classes or stop == len(names)
        assert full or length(start, stop + 1) > max_tokens
        for target, row in zip(prompt.target_ids.tolist(), prompt.positive_map):
            text = TOKENIZER.decode(prompt.input_ids[row > 0])
            assert row.any() == bool(text)
            assert row.sum().item() == pytest.approx(1.0, abs=1e-5) or not row.any()
            # A character of several tokens ends at its first one: compare what reads as text.
            assert cleaned[target].strip().startswith(text.strip().rstrip("\ufffd"))
        start = stop


def test_format_template_and_suppressed_names():
    prompts = build_detection_prompts(
        TOKENIZER, ["hair_drier", "dog"], templates="a {} here", suppressed=["cat", "cow"]
    )
    (prompt,) = prompts
    assert prompt.text == "a hair drier here. a dog here. cat. cow"
    words = [TOKENIZER.decode(prompt.input_ids[row > 0]).strip() for row in prompt.positive_map]
    assert words == ["hair drier", "dog"]


def test_lead_counts_against_the_limit_of_every_caption():
    names = [f"dog{n}" for n in range(9)]
    lead = "object detection : "
    prompts = build_detection_prompts(TOKENIZER, names, max_tokens=30, lead=lead)
    assert len(prompts) > 1
    for prompt in prompts:
        assert prompt.text.startswith(lead + "dog") and prompt.num_tokens <= 30
        words = [TOKENIZER.decode(prompt.input_ids[row > 0]).strip() for row in prompt.positive_map]
        assert words == [names[target] for target in prompt.target_ids]
    # No caption could have taken the first class of the next one.
    for prompt, following in zip(prompts, prompts[1:]):
        longer = f"{prompt.text}. {names[following.target_ids[0]]}"
        assert len(TOKENIZER(longer)["input_ids"]) > 30


def test_caption_and_characters_of_its_names():
    caption, spans = detection_caption(
        ["hot_dog", "(x)", "tv"], separator=" ; ", templates="a {}!", suppressed=["cow"], lead="> "
    )
    assert caption == "> a hot dog! ; a ! ; a tv! ; cow"
    assert [caption[begin:end] for begin, end in spans] == ["hot dog", "", "tv"]
    with pytest.raises(ValueError, match="one name or more"):
        detection_caption([])


def test_clean_templates():
    templates = [{"name": "a_(b)c", "prefix": "_"}, {"suffix": "_"}]
    assert clean_templates(templates) == [{"name": "a c", "prefix": "_"}, {"suffix": "_"}]
    assert clean_templates("a_{}") == "a_{}" and clean_templates(None) is None
    assert templates[0]["name"] == "a_(b)c"


def test_templates_are_counted_over_all_prompts():
    templates = [{"prefix": f"p{i} ", "name": f"n{i}", "suffix": ""} for i in range(3)]
    prompts = build_detection_prompts(
        TOKENIZER, ["x", "y", "z"], max_classes=2, templates=templates
    )
    assert [prompt.text for prompt in prompts] == ["p0 n0. p1 n1", "p2 n2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": []}, "one name or more"),
        ({"class_names": "dog"}, "one name or more"),
        ({"class_names": ["dog", "(x)"]}, r"'\(x\)' reads ''"),
        ({"class_names": ["dog", "_"]}, "has no token of its own"),
        ({"class_names": ["dog"] * 3, "max_tokens": 2}, "'dog' alone makes a caption of"),
        ({"class_names": ["dog"], "max_classes": 0}, "max_classes"),
        ({"class_names": ["dog"], "templates": "a photo"}, "exactly once"),
        ({"class_names": ["dog", "cat"], "templates": [{"name": "x"}]}, "1 templates for 2"),
        ({"class_names": ["dog"], "on_empty": "drop"}, "on_empty"),
    ],
)
def test_detection_errors(arguments, message):
    names = arguments.pop("class_names")
    with pytest.raises(ValueError, match=message):
        build_detection_prompts(TOKENIZER, names, **arguments)


def test_empty_class_may_be_kept():
    (prompt,) = build_detection_prompts(TOKENIZER, ["(x)", "dog"], on_empty="keep")
    assert prompt.positive_map.sum(dim=1).tolist() == [0, 1]


def test_grounding_prompt():
    caption = "a red dog and a cat"
    prompt = build_grounding_prompt(TOKENIZER, caption, [[(2, 9)], [(16, 19)], [(2, 5), (16, 19)]])
    words = [TOKENIZER.decode(prompt.input_ids[row > 0]).strip() for row in prompt.positive_map]
    assert words == ["red dog", "cat", "red cat"]
    assert prompt.target_ids.tolist() == [0, 1, 2]
    torch.testing.assert_close(prompt.positive_map.sum(dim=1), torch.ones(3))


def test_grounding_targets_without_spans_keep_an_empty_row():
    prompt = build_grounding_prompt(TOKENIZER, "a dog", [[], [(2, 5)]])
    assert prompt.positive_map.sum(dim=1).tolist() == [0, 1]
    assert build_grounding_prompt(TOKENIZER, "a dog", []).num_targets == 0


def test_long_captions_may_be_truncated():
    caption = "dog " * 300 + "cat"
    spans = [[(0, 3)], [(1196, 1199)], [(4, 7), (1200, 1203)], [(0, 1203)]]
    with pytest.raises(ValueError, match="Target 1 .* covers no token"):
        build_grounding_prompt(TOKENIZER, caption, spans, on_overflow="truncate")
    options = {"on_overflow": "truncate", "on_empty": "keep"}
    prompt = build_grounding_prompt(TOKENIZER, caption, spans, max_tokens=40, **options)
    assert prompt.num_tokens == 40 and prompt.text == caption
    whole = TOKENIZER(caption)["input_ids"]
    assert prompt.input_ids.tolist() == [*whole[:39], whole[-1]]
    # A span that is cut marks nothing, not even the tokens that are left of it.
    marked = [TOKENIZER.decode(prompt.input_ids[row > 0]).strip() for row in prompt.positive_map]
    assert marked == ["dog", "", "dog", ""]
    short = build_grounding_prompt(TOKENIZER, "a dog", [[(2, 5)]], **options)
    assert torch.equal(
        short.positive_map, build_grounding_prompt(TOKENIZER, "a dog", [[(2, 5)]]).positive_map
    )
    with pytest.raises(ValueError, match="on_overflow must be one of"):
        build_grounding_prompt(TOKENIZER, "a dog", [], on_overflow="cut")


@pytest.mark.parametrize(
    ("caption", "spans", "message"),
    [
        ("a dog", [[(0, 1)], [(2, 6)]], r"Target 1 .*\[2, 6\) lies outside .* 5 characters"),
        ("a dog", [[(-1, 3)]], "lies outside"),
        ("a dog", [[(5, 2)]], r"\[5, 2\) is reversed"),
        ("a    dog", [[(3, 4)]], r"Target 0 of the caption 'a    dog' covers no token"),
        ("dog " * 300, [], "'dog dog .* has .* tokens .* but the limit is 256"),
    ],
)
def test_grounding_errors(caption, spans, message):
    with pytest.raises(ValueError, match=message):
        build_grounding_prompt(TOKENIZER, caption, spans)
