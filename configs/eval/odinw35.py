"""ODinW-35, AP of boxes per set, and their mean.

    train_net.py --config-file configs/eval/odinw35.py --eval-only train.init_checkpoint=FILE.pth

Data: odinw/, see datasets/README.md; sets that are not there are named and left out.
Protocol: test splits; all names in one caption, in the words published with the set where there are
such (protocol.dataset_prompts=false: plain names); class scores above 0.05; 100 boxes per image.
"""

from detectron2.config import LazyCall as L

from fiber_d2.evaluation.odinw import odinw_summary, odinw_test_nodes

from ..common.eval import dataloader, model, options_from_protocol, protocol, train  # noqa: F401

dataloader.test = odinw_test_nodes(35, split="test", **options_from_protocol())
train.output_dir = "output/eval/odinw35"
# Called with the results of all sets: the mean, in {train.output_dir}/odinw.json.
summary = L(odinw_summary)(which=35)
