"""LVIS v1 minival, FixedAP of boxes. Published: 35.8 zero-shot, 56.9 fine-tuned.

    train_net.py --config-file configs/eval/lvis_minival.py --eval-only \
        train.init_checkpoint=FILE.pth

Data: lvis/lvis_v1_minival_inserted_image_name.json, coco/val2017/.
Protocol: 40 classes per caption, so 31 captions per image; class scores above 0.05; 300 boxes per
image and caption; of each class the best 10,000 boxes of the whole data set.
"""

from ..common.eval import dataloader, model, protocol, train  # noqa: F401

dataloader.test.dataset = "lvis_evaluation_mini_val"
protocol.max_classes = 40
# As the original, no limit over the captions of an image together. One such as
# model.head.postprocessor.max_merged_detections=300 saves memory, and lowers FixedAP.
model.head.postprocessor.update(max_detections=300, max_merged_detections=0)
