"""Training captions: what must hold for every draw, and what holds over many of them."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.data.captions import (
    DetectionPrompter,
    SampledDetectionPrompter,
    draw_num_negatives,
)
from fiber_d2.text import clean_name, load_tokenizer

TOKENIZER = load_tokenizer("shapes")
WORDS = ["red", "blue_circle", "big square (shape)", "dog", "t-shirt", "tv", "hot_dog", "crème"]
NAMES = [f"{word}_{number}" for number in range(8) for word in WORDS]
ALL = (0, 0, 1)


def record(labels):
    return {"image_id": 1, "annotations": [{"category_id": int(label)} for label in labels]}


def words(prompt):
    """What the marked tokens of each target read."""
    return [TOKENIZER.decode(prompt.input_ids[row > 0]).strip() for row in prompt.positive_map]


def draw(prompter, labels, count, seed=0):
    np.random.seed(seed)
    return [prompter.for_training(record(labels)) for _ in range(count)]


def test_all_classes_in_order():
    prompter = DetectionPrompter(
        TOKENIZER, ["dog", "hot_dog", "tv"], lead="object detection : ", separator=" . "
    )
    prompt, rows = prompter.for_training(record([2, 0, 2]))
    assert prompt.text == "object detection : dog . hot dog . tv"
    assert prompter.for_evaluation(record([])).text == prompt.text
    assert rows == [2, 0, 2] and prompt.target_ids.tolist() == [0, 1, 2]
    assert words(prompt) == ["dog", "hot dog", "tv"]


def test_names_of_templates_are_cleaned_in_training_only():
    templates = [{"prefix": "a ", "name": "hot_dog", "suffix": "!"}, {"suffix": " set"}]
    prompter = DetectionPrompter(TOKENIZER, ["sausage", "tv_(device)"], templates=templates)
    assert prompter.for_evaluation(record([])).text == "a hot_dog!. tv  set"
    prompt, _ = prompter.for_training(record([]))
    assert prompt.text == "a hot dog!. tv  set"
    assert words(prompt) == ["hot dog", "tv"]


def test_shuffled_classes_take_every_order():
    prompter = DetectionPrompter(TOKENIZER, ["dog", "red", "tv"], shuffle=True)
    draws = draw(prompter, [1, 2, 1], 200)
    counts = Counter(tuple(prompt.target_ids.tolist()) for prompt, _ in draws)
    assert len(counts) == 6 and min(counts.values()) > 15
    for prompt, rows in draws:
        assert prompt.target_ids[rows].tolist() == [1, 2, 1]
        assert words(prompt) == [["dog", "red", "tv"][t] for t in prompt.target_ids]


def test_too_many_classes_for_one_caption():
    prompter = DetectionPrompter(TOKENIZER, NAMES, max_tokens=64)
    with pytest.raises(ValueError, match="64 classes need .* captions of at most 64 tokens"):
        prompter.for_training(record([]))
    with pytest.raises(ValueError, match="train with sampled classes"):
        prompter.check(record([]), is_train=True)
    prompter.check(record([]), is_train=False)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_draw_keeps_to_the_rules(data):
    count = data.draw(st.integers(1, len(NAMES)))
    names = NAMES[:count]
    budget = data.draw(st.integers(14, 120))
    max_total = data.draw(st.none() | st.integers(1, 20))
    num_negatives = data.draw(st.integers(0, 30))
    separator = data.draw(st.sampled_from([". ", " ", " . "]))
    control = data.draw(st.sampled_from([ALL, (1, 0, 0), (0, 1, 0), (0, 0, 0), (0.3, 0.3, 0.2)]))
    labels = data.draw(st.lists(st.integers(0, count - 1), max_size=40))
    prompter = SampledDetectionPrompter(
        TOKENIZER,
        names,
        num_negatives=num_negatives,
        control_probabilities=control,
        token_budget=budget,
        max_total=max_total,
        separator=separator,
    )
    np.random.seed(data.draw(st.integers(0, 1000)))
    prompt, rows = prompter.for_training(record(labels))
    targets = prompt.target_ids.tolist()
    present = set(targets) & set(labels)
    absent = set(targets) - present

    assert prompt.num_tokens <= budget + 2
    assert prompt.text == separator.join(clean_name(names[target]) for target in targets)
    assert len(set(targets)) == len(targets) <= (max_total or count)
    assert words(prompt) == [
        word.strip() for word in (clean_name(names[target]) for target in targets)
    ]
    assert rows == [targets.index(label) if label in targets else -1 for label in labels]
    assert len(absent) <= max(num_negatives, 0 if labels else 1)
    if labels:
        assert present
        if control[0] == 1:
            assert len(absent) <= 1
        if control[1] == 1:
            assert not absent
    counts = prompter.token_counts
    if counts[sorted(set(labels))].sum() <= budget and len(set(labels)) <= (max_total or count):
        assert present == set(labels)
    else:
        # The kept ones fit, and the next of any order would not have.
        assert counts[list(present)].sum() <= budget
        left_out = sorted(set(labels) - present)
        full = counts[list(present)].sum() + counts[left_out].max() > budget
        assert full or len(present) == max_total


def test_token_counts_are_those_of_the_name_with_its_separator():
    prompter = SampledDetectionPrompter(TOKENIZER, NAMES, separator=" ; ")
    expected = [len(TOKENIZER.tokenize(clean_name(name) + " ; ")) for name in NAMES]
    assert prompter.token_counts.tolist() == expected


def test_classes_that_overflow_rotate():
    prompter = SampledDetectionPrompter(TOKENIZER, NAMES, token_budget=60)
    labels = range(40)
    draws = draw(prompter, labels, 150)
    counts = Counter()
    for prompt, rows in draws:
        targets = set(prompt.target_ids.tolist())
        # A class of the image that was left out is not asked for as an absent one.
        assert {label for label, row in zip(labels, rows) if row >= 0} == targets & set(labels)
        counts.update(targets & set(labels))
    kept = sum(counts.values()) / len(draws)
    assert kept < 15
    assert set(counts) == set(labels)
    # Each about as often; short names a little more often than long ones.
    expected = len(draws) * kept / len(labels)
    assert 0.3 * expected < min(counts.values()) and max(counts.values()) < 2.5 * expected


def test_every_absent_class_is_drawn_equally_often():
    prompter = SampledDetectionPrompter(
        TOKENIZER, NAMES, num_negatives=8, control_probabilities=ALL
    )
    counts = Counter()
    for prompt, _ in draw(prompter, [3, 5], 400):
        assert prompt.num_targets == 10
        counts.update(prompt.target_ids.tolist())
    assert counts.pop(3) == counts.pop(5) == 400
    assert len(counts) == len(NAMES) - 2
    frequencies = np.array(list(counts.values()))
    expected = 400 * 8 / (len(NAMES) - 2)
    assert ((frequencies - expected) ** 2 / expected).sum() < 120  # 61 degrees of freedom


def test_place_of_the_image_s_classes_is_random():
    prompter = SampledDetectionPrompter(
        TOKENIZER, NAMES, num_negatives=3, control_probabilities=ALL
    )
    places = Counter(rows[0] for _, rows in draw(prompter, [7], 400))
    assert sorted(places) == [0, 1, 2, 3] and min(places.values()) > 60


@pytest.mark.parametrize("control", [(0.05, 0.05, 0.5, 0.2), (0.1, 0.2, 0.3), (0, 0, 0)])
def test_number_of_negatives(control):
    full, draws = 10, 20_000
    np.random.seed(1)
    counts = np.bincount(
        [draw_num_negatives(control, full) for _ in range(draws)], minlength=full + 1
    )
    expected = np.full(full + 1, (1 - sum(control[:3])) / full)
    expected[0] = 0
    expected[[1, 0, full]] += control[:3]
    assert len(counts) == full + 1
    # Six standard deviations of each count.
    spread = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 6 * spread).all()


def test_number_of_negatives_of_a_prompter():
    prompter = SampledDetectionPrompter(
        TOKENIZER, NAMES, num_negatives=5, control_probabilities=(0.25, 0.25, 0.25)
    )
    numbers = Counter(prompt.num_targets - 1 for prompt, _ in draw(prompter, [0], 1000))
    expected = {0: 0.25, 1: 0.3, 2: 0.05, 3: 0.05, 4: 0.05, 5: 0.3}
    assert set(numbers) == set(expected)
    assert all(abs(numbers[n] / 1000 - share) < 0.08 for n, share in expected.items())


def test_seed_decides_and_a_fourth_probability_does_not():
    prompters = [
        SampledDetectionPrompter(TOKENIZER, NAMES, control_probabilities=control)
        for control in ((0.05, 0.05, 0.5), (0.05, 0.05, 0.5, 0.2))
    ]
    first, again, four = (
        [prompt.text for prompt, _ in draw(p, [1, 2], 20, seed=3)]
        for p in (prompters[0], prompters[0], prompters[1])
    )
    other = [prompt.text for prompt, _ in draw(prompters[0], [1, 2], 20, seed=4)]
    assert first == again == four != other
    copied = pickle.loads(pickle.dumps(prompters[0]))  # as it goes to a loading process
    assert [prompt.text for prompt, _ in draw(copied, [1, 2], 20, seed=3)] == first


def test_check_draws_no_random_number():
    prompter = SampledDetectionPrompter(TOKENIZER, NAMES)
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    prompter.check(record([0, 1]), is_train=True)
    prompter.check(record([0, 1]), is_train=False)
    assert np.random.get_state()[1].tolist() == before
    with pytest.raises(ValueError, match="category_id 64 is none of .* 0 to 63"):
        prompter.check(record([64]), is_train=True)
    with pytest.raises(ValueError, match="category_id -1"):
        prompter.for_training(record([-1]))


def test_background_and_classes_that_read_alike_are_never_asked_for_as_absent():
    names = ["__background__", "bow_(weapon)", "bow_(ribbon)", "dog"]
    prompter = SampledDetectionPrompter(TOKENIZER, names, control_probabilities=ALL)
    for prompt, rows in draw(prompter, [1], 20):
        assert sorted(prompt.target_ids.tolist()) == [1, 3]
        assert prompt.target_ids[rows].tolist() == [1]
    for prompt, _ in draw(prompter, [3], 20):
        assert sorted(prompt.target_ids.tolist()) == [1, 2, 3]


def test_an_image_without_boxes_asks_for_something():
    for control in (ALL, (0, 1, 0)):
        prompter = SampledDetectionPrompter(
            TOKENIZER, NAMES, num_negatives=4, control_probabilities=control
        )
        for prompt, rows in draw(prompter, [], 10):
            assert rows == [] and prompt.num_targets == (4 if control == ALL else 1)
    prompter = SampledDetectionPrompter(TOKENIZER, ["__background__"])
    with pytest.raises(ValueError, match="no class to ask for"):
        prompter.for_training(record([]))


def test_templates():
    templates = [{"prefix": "a ", "suffix": "!"}, {"name": "hot_dog"}, {}]
    names = ["dog", "sausage", "tv"]
    prompter = SampledDetectionPrompter(
        TOKENIZER, names, templates=templates, control_probabilities=ALL
    )
    texts = ["a dog!", "hot dog", "tv"]
    assert prompter.token_counts.tolist() == [len(TOKENIZER.tokenize(t + ". ")) for t in texts]
    for prompt, _ in draw(prompter, [0], 10):
        assert prompt.text == ". ".join(texts[target] for target in prompt.target_ids)
    (evaluation,) = prompter.prompts
    assert evaluation.text == "a dog!. hot_dog. tv"


def test_captions_are_measured_in_the_end(monkeypatch):
    """Tokens of single names need not add up to those of the caption."""
    prompter = SampledDetectionPrompter(
        TOKENIZER, NAMES[:30], token_budget=60, control_probabilities=ALL
    )
    monkeypatch.setattr(prompter, "token_counts", np.ones(30, dtype=np.int64))
    seen = set()
    for prompt, rows in draw(prompter, range(5), 10):
        assert prompt.num_tokens <= 62
        assert min(rows) >= 0  # what is given up are the absent classes
    for prompt, rows in draw(prompter, range(30), 20):
        assert prompt.num_tokens <= 62 and prompt.num_targets > 3
        assert {row >= 0 for row in rows} == {True, False}
        seen |= set(prompt.target_ids.tolist())
    assert seen == set(range(30))


def test_more_classes_than_any_caption_holds():
    names = [f"{WORDS[n % 8]} {n}" for n in range(1203)]
    prompter = SampledDetectionPrompter(TOKENIZER, names, control_probabilities=ALL)
    prompts = prompter.for_evaluation(record([]))
    assert len(prompts) > 10 and all(prompt.num_tokens <= 256 for prompt in prompts)
    assert torch.cat([prompt.target_ids for prompt in prompts]).tolist() == list(range(1203))
    for labels in ([1202], range(0, 1203, 2)):
        for prompt, rows in draw(prompter, labels, 3):
            assert 200 < prompt.num_tokens <= 256
            kept = [(label, row) for label, row in zip(labels, rows) if row >= 0]
            assert kept and all(prompt.target_ids[row] == label for label, row in kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_probabilities": (0.5, 0.5)}, "control_probabilities must be the three"),
        ({"control_probabilities": (0.5, 0.5, 0.1)}, "add up to more than 1"),
        ({"control_probabilities": (-0.1, 0.5, 0.1)}, "must not be negative"),
        ({"num_negatives": -1}, "num_negatives"),
        ({"max_total": 0}, "max_total"),
        ({"token_budget": 4}, "'big square .*' has .* but a training caption holds 4"),
        ({"max_tokens": 6}, "'big square .*' .*"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampledDetectionPrompter(TOKENIZER, ["dog", "big square elephant"], **arguments)


def test_class_without_token():
    with pytest.raises(ValueError, match=r"'\(x\)' reads ''"):
        SampledDetectionPrompter(TOKENIZER, ["dog", "(x)"])
    prompter = SampledDetectionPrompter(
        TOKENIZER, ["dog", "(x)"], on_empty="keep", control_probabilities=ALL
    )
    prompt, rows = prompter.for_training(record([1]))
    assert prompt.positive_map[rows[0]].sum() == 0 and prompt.num_targets == 2
