"""RefCOCO+ testA, P@1. Published, fine-tuned, by generalised IoU: 90.13.

    train_net.py --config-file configs/eval/refcocoplus_testA.py --eval-only \
        train.init_checkpoint=FILE.pth

Data: mdetr_annotations/finetune_refcoco+_testA.json, coco/train2014/.
Protocol: one expression at a time, no score threshold, the best of 100 boxes counts.
"""

from ..common.eval_refexp import dataloader, model, protocol, train  # noqa: F401

dataloader.test.dataset = "refcoco+_testA"
