"""Your own COCO-format data: edit the three fields, or give them as overrides.

    train_net.py --config-file configs/eval/custom_coco.py --eval-only \
        train.init_checkpoint=FILE.pth data.json=VAL.json data.image_root=IMAGES \
        "data.prompts='a photo of a {}'"

Class names are read from the file. A data set that a module of yours registers, whatever its
format: `--import my_datasets.py` before the overrides, and dataloader.test.dataset=NAME.
Protocol: COCO AP; as many names per caption as fit; class scores above 0.05; 100 boxes per caption.
"""

from detectron2.config import LazyCall as L

from fiber_d2.data import register_coco_json

# For a model of another recipe, take `model` from there.
from ..common.eval import dataloader, model, protocol, train  # noqa: F401

data = dict(
    json="datasets/custom/val.json",
    image_root="datasets/custom/images",
    # None: the class names. Else a format such as "a photo of a {}"; or for some classes, by
    # name, other words: {"puffin": {"name": "puffin", "suffix": " with an orange beak"}}.
    prompts=None,
)

# Called in every process before the data set is used.
register = dict(
    test=L(register_coco_json)(
        name="custom",
        json_file="${data.json}",
        image_root="${data.image_root}",
        prompts="${data.prompts}",
    )
)
dataloader.test.dataset = "custom"
