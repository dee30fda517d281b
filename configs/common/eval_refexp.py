"""What the recipes of RefCOCO, RefCOCO+ and RefCOCOg share: FIBER-B v3, and every box a candidate.

Their published numbers are of models fine-tuned on the respective data set, and count a hit where
the generalised IoU reaches 0.5: compare `P@1_giou`. The headline `P@1` uses plain IoU.
"""

from .eval import dataloader, model, protocol, train  # noqa: F401

model.backbone.vision.query_norm = True
# However weak, a box is better than none; 100 are kept, as elsewhere.
model.head.postprocessor.update(score_thresh=0.0, pre_nms_topk=3000)
