"""ODinW-13, AP of boxes per set, and their mean. Published mean: 47.0 zero-shot, 65.9 fine-tuned
(one checkpoint per set).

    train_net.py --config-file configs/eval/odinw13.py --eval-only train.init_checkpoint=FILE.pth

Data: odinw/, see datasets/README.md; sets that are not there are named and left out.
Protocol: test splits; all names in one caption, in the words published with the set where there are
such (protocol.dataset_prompts=false: plain names); class scores above 0.05; 100 boxes per image.
"""

from detectron2.config import LazyCall as L

from fiber_d2.evaluation.odinw import odinw_summary, odinw_test_nodes

from ..common.eval import dataloader, model, options_from_protocol, protocol, train  # noqa: F401

dataloader.test = odinw_test_nodes(13, split="test", **options_from_protocol())
train.output_dir = "output/eval/odinw13"
# Called with the results of all sets: the mean, in {train.output_dir}/odinw.json.
summary = L(odinw_summary)(which=13)
