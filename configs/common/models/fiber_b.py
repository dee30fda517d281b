"""FIBER-B, fusion v2; set ``model.backbone.vision.query_norm=True`` for v3."""

from detectron2.config import LazyCall as L

from fiber_d2.modeling import (
    FIBER,
    AnchorGrid,
    ATSSLanguageHead,
    DynamicHead,
    FeaturePyramid,
    FusionBackbone,
    GroundingLoss,
    PostProcessor,
    RobertaEncoder,
    SwinTransformer,
)

model = L(FIBER)(
    backbone=L(FusionBackbone)(
        vision=L(SwinTransformer)(
            embed_dim=128,
            depths=[2, 2, 18, 2],
            num_heads=[4, 8, 16, 32],
            window=12,
            # Per stage, how many of its last blocks exchange with the text tower.
            fused_blocks=[0, 0, 4, 2],
            text_dim="${..text.dim}",
            query_norm=False,
            mlp_ratio=4.0,
            drop_path=0.4,
            patch_size=4,
            # -1 trains everything; 2, as in pre-training, leaves patch embedding and stage 1 as
            # they are.
            frozen_stages=-1,
            # Here, in `text` and in `head.tower`: the same numbers from less memory in training.
            # All three keep 0.6 instead of 7.2 GiB for an image of 800x1344 between the passes, as
            # computed, and take 1.43 times as long, as timed on a CPU with half the width, an image
            # of 320x320 and float32 (benchmarks/results/activation_checkpointing.json).
            checkpoint=False,
        ),
        text=L(RobertaEncoder)(
            vocab_size=50265,
            dim=768,
            num_layers=12,
            num_heads=12,
            mlp_dim=3072,
            max_positions=514,
            # Width of the image tokens at each exchange: four times stage 3, twice stage 4.
            image_dims=[512, 512, 512, 512, 1024, 1024],
            dropout=0.1,
            checkpoint=False,
        ),
        neck=L(FeaturePyramid)(
            in_channels=[256, 512, 1024],
            out_channels=256,
            drop_block=0.3,
        ),
    ),
    head=L(ATSSLanguageHead)(
        tower=L(DynamicHead)(
            channels="${...backbone.neck.out_channels}",
            num_blocks=6,
            norm_groups=16,
            # As the published weights need; "resampled" is the geometric alternative.
            offset_addressing="flat",
            zero_init_offsets=True,
            checkpoint=False,
        ),
        anchors=L(AnchorGrid)(strides=[8, 16, 32, 64, 128], sizes=[64, 128, 256, 512, 1024]),
        text_dim="${..backbone.text.dim}",
        loss=L(GroundingLoss)(focal_alpha=0.25, focal_gamma=2.0, box_weight=2.0, atss_topk=9),
        postprocessor=L(PostProcessor)(
            score_thresh=0.05,
            pre_nms_topk=1000,
            nms_thresh=0.6,
            max_detections=100,
            score_aggregation="mean",
            max_merged_detections=0,
        ),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
    prompt_batch_size=16,
    # Of evaluation: memory for what of captions is the same for all images, 0 for none.
    text_cache_mib=256,
    # "bfloat16" or "float16": evaluation in mixed precision.
    inference_precision=None,
)
