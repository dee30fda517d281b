"""COCO val2017, AP of boxes. Published: 49.3 zero-shot, 58.4 fine-tuned (another checkpoint).

    train_net.py --config-file configs/eval/coco_zeroshot.py --eval-only \
        train.init_checkpoint=FILE.pth

Data: coco/annotations/instances_val2017.json, coco/val2017/.
Protocol: all 80 names in one caption, class scores above 0.05, 100 boxes per image.
"""

from ..common.eval import dataloader, model, protocol, train  # noqa: F401

dataloader.test.dataset = "coco_grounding_val"
