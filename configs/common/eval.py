"""What the recipes of configs/eval share: FIBER-B, a test set, and how the original tests.

A recipe names its data set, and what is particular to its protocol. All of them run by

    train_net.py --config-file configs/eval/RECIPE.py --eval-only train.init_checkpoint=FILE.pth

with a checkpoint of the original or of ours, and take `key=value` behind it.
"""

from detectron2.config import LazyCall as L

from fiber_d2.data import ResizeShortestEdgeTruncated, build_test_loader
from fiber_d2.evaluation import build_evaluator

from .models.fiber_b import model  # noqa: F401
from .train import train

# How images and words are shown to the model: all test sets of a recipe read it.
protocol = dict(
    # A name, or the path of a tokenizer.json or of its folder.
    tokenizer="roberta-base",
    # In pixels; the longer side is cut to whole ones, not rounded.
    short_edge_length=800,
    max_size=1333,
    # Between the class names of a caption; none follows the last.
    separator=". ",
    # Ask in the words that a data set brings along, where it does, instead of its class names.
    dataset_prompts=True,
    # Classes per caption; None: as many as fit. More classes are asked for in several captions.
    max_classes=None,
    # The original pads all captions to this length, we to the longest: the numbers are the same.
    max_tokens=256,
    # Images at a time in each process; the numbers are those of one at a time. Those of a batch
    # that are padded to the same multiples of 32 pixels pass the model together, the others apart.
    batch_size=1,
    num_workers=4,
)


def options_from_protocol():
    """Arguments of a test loader, which read `protocol` when the recipe is complete."""
    names = set(protocol) - {"short_edge_length", "max_size"}
    resize = L(ResizeShortestEdgeTruncated)(
        short_edge_length="${protocol.short_edge_length}", max_size="${protocol.max_size}"
    )
    return dict({name: f"${{protocol.{name}}}" for name in sorted(names)}, augmentations=[resize])


dataloader = dict(
    test=L(build_test_loader)(dataset="???", **options_from_protocol()),
    evaluator=L(build_evaluator)(output_dir="${train.output_dir}/inference"),
)

train.output_dir = "output/eval/${dataloader.test.dataset}"
