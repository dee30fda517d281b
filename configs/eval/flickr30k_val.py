"""Flickr30k Entities val, recall@1/5/10. Published: 87.1 / 96.1 / 97.4.

    train_net.py --config-file configs/eval/flickr30k_val.py --eval-only \
        train.init_checkpoint=FILE.pth

Data: mdetr_annotations/final_flickr_separateGT_val.json, flickr30k/flickr30k_images/,
flickr30k/flickr30k/ (the Entities files).
Protocol: one sentence at a time, class scores above 0.05, 100 boxes for all phrases of a sentence;
a phrase is found where IoU with any box of its entity reaches 0.5 (AnyBox).
"""

from ..common.eval import dataloader, model, protocol, train  # noqa: F401

dataloader.test.dataset = "flickr30k_val"
