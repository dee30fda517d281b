"""LVIS v1 val, FixedAP of boxes.

    train_net.py --config-file configs/eval/lvis_val.py --eval-only train.init_checkpoint=FILE.pth

Data: lvis/lvis_v1_val.json, coco/val2017/, coco/train2017/.
Protocol: that of lvis_minival.py, on all 19,809 images.
"""

from .lvis_minival import dataloader, model, protocol, train  # noqa: F401

dataloader.test.dataset = "lvis_evaluation_val"
