"""Pre-training of FIBER-B, fusion v2, on MixedGrounding, Flickr30k and Objects365.

    train_net.py --config-file configs/pretrain/mixed_flickr_objects365.py --num-gpus 16 \
        --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT \
        train.init_checkpoint=START.pth

64 images per step, one on each of 64 GPUs; 800,000 steps are 51.2 million images, whichever the
sizes of the sets. Images are drawn from all sets alike. The rate drops at 67 % and 89 %, steps
536,000 and 712,000; weight decay drops from 1e-2 to 1e-3 and 1e-4 at 66.7 % of those, steps
357,512 and 474,904.
START.pth holds both towers: tools/convert_checkpoint.py makes it, see docs/checkpoints.md.

Published, without fine-tuning: COCO 49.3 AP, LVIS minival 35.8 FixedAP, ODinW-13 47.0 AP.
Fine-tuned from here: configs/finetune.

Data: mdetr_annotations/final_mixed_train_no_coco.json, final_flickr_separateGT_train.json,
Objects365/objects365_train_vgoiv6.cas2000.yaml and their images; COCO val2017 to look on.
"""

from ..common.pretrain import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    protocol,
    train,
)

dataloader.train.datasets = ["mixed_train_no_coco", "flickr30k_train", "object365_dt_train"]
train.output_dir = "output/pretrain/mixed_flickr_objects365"
