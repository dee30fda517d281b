import math

import pytest
import torch

from fiber_d2.modeling import AnchorGrid, PostProcessor
from fiber_d2.modeling.postprocess import aggregate_token_scores


def _positive_map():
    positive_map = torch.zeros(2, 3, 5)
    positive_map[0, 0, [1, 2]] = 0.5
    positive_map[0, 2, 4] = 1.0  # row 1 has no token
    positive_map[1, 1, [0, 1, 3]] = 1 / 3
    return positive_map


def test_aggregation_agrees_with_loops():
    scores, positive_map = torch.rand(2, 7, 5), _positive_map()
    geometric = lambda values, dim: values.log().mean(dim).exp()  # noqa: E731
    for how, reduce in (("mean", torch.mean), ("max", torch.amax), ("power", geometric)):
        found = aggregate_token_scores(scores, positive_map, how)
        for pair in range(2):
            for target in range(3):
                tokens = positive_map[pair, target] > 0
                expected = (
                    reduce(scores[pair][:, tokens], dim=1) if tokens.any() else torch.zeros(7)
                )
                torch.testing.assert_close(found[pair, :, target], expected)
    with pytest.raises(ValueError, match="median"):
        aggregate_token_scores(scores, positive_map, "median")


def _run(processor, token_logits, centerness, positive_map=None):
    anchors = AnchorGrid(strides=(8, 16), sizes=(16, 32))(
        [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)]
    )
    pairs = token_logits.shape[0]
    if positive_map is None:
        positive_map = torch.eye(token_logits.shape[2]).expand(pairs, -1, -1)
    return processor(
        anchors,
        token_logits,
        torch.zeros(pairs, 20, 4),
        centerness,
        positive_map,
        [(30, 28)] * pairs,
    )


def _logit(p):
    return math.log(p / (1 - p))


def test_threshold_applies_before_centerness_and_score_is_the_geometric_mean():
    logits = torch.full((1, 20, 2), -20.0)
    logits[0, 5, 0] = _logit(0.06)
    logits[0, 10, 1] = _logit(0.04)
    centerness = torch.full((1, 20), _logit(0.5))
    (result,) = _run(PostProcessor(score_thresh=0.05), logits, centerness)
    assert result.pred_classes.tolist() == [0]
    torch.testing.assert_close(result.scores, torch.tensor([math.sqrt(0.06 * 0.5)]))
    # Anchor 5 is centred on (11.5, 11.5) with a side of 16 pixels, inclusively counted.
    torch.testing.assert_close(result.pred_boxes.tensor, torch.tensor([[4.0, 4.0, 19.0, 19.0]]))


def test_boxes_are_clipped_to_the_unpadded_image_and_sorted():
    torch.manual_seed(0)
    (result,) = _run(PostProcessor(), torch.randn(1, 20, 3), torch.randn(1, 20))
    boxes = result.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 27 and boxes[:, 3].max() <= 29
    assert (result.scores[1:] <= result.scores[:-1]).all() and len(result) > 3


def test_level_cut_and_ties_at_the_limit():
    logits = torch.full((1, 20, 1), -20.0)
    far_apart = [0, 3, 12, 15]
    logits[0, far_apart, 0] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    centerness = torch.zeros(1, 20)
    (result,) = _run(PostProcessor(max_detections=2), logits, centerness)
    assert len(result) == 4, "all that tie with the second are kept"
    (result,) = _run(PostProcessor(pre_nms_topk=1), logits, centerness)
    assert len(result) == 1


def test_merge_sorts_and_limits():
    torch.manual_seed(0)
    processor = PostProcessor(max_merged_detections=5)
    results = _run(processor, torch.randn(2, 20, 3), torch.randn(2, 20))
    merged = processor.merge(results)
    every = torch.cat([result.scores for result in results])
    assert merged.scores.tolist() == every.sort(descending=True).values[:5].tolist()
