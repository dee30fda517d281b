"""RefCOCO testB, P@1. Published, fine-tuned, by generalised IoU: 87.26.

    train_net.py --config-file configs/eval/refcoco_testB.py --eval-only \
        train.init_checkpoint=FILE.pth

Data: mdetr_annotations/finetune_refcoco_testB.json, coco/train2014/.
Protocol: one expression at a time, no score threshold, the best of 100 boxes counts.
"""

from ..common.eval_refexp import dataloader, model, protocol, train  # noqa: F401

dataloader.test.dataset = "refcoco_testB"
