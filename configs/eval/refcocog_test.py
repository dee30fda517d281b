"""RefCOCOg test, P@1. Published, fine-tuned, by generalised IoU: 87.32.

    train_net.py --config-file configs/eval/refcocog_test.py --eval-only \
        train.init_checkpoint=FILE.pth

Data: mdetr_annotations/finetune_refcocog_test.json, coco/train2014/.
Protocol: one expression at a time, no score threshold, the best of 100 boxes counts.
"""

from ..common.eval_refexp import dataloader, model, protocol, train  # noqa: F401

dataloader.test.dataset = "refcocog_test"
