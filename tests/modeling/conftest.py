import pytest
import torch

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


def build_small_model(
    query_norm=False,
    seed=0,
    *,
    drop_path=0.0,
    dropout=0.0,
    drop_block=0.0,
    frozen_stages=-1,
    checkpoint=(),
):
    """A model of every part, a fraction of a million parameters.

    ``checkpoint`` names the parts that compute activations again: vision, text, tower.
    """
    torch.manual_seed(seed)
    model = FIBER(
        backbone=FusionBackbone(
            vision=SwinTransformer(
                embed_dim=8,
                depths=(1, 1, 3, 2),
                num_heads=(1, 1, 2, 2),
                window=4,
                fused_blocks=(0, 0, 2, 2),
                text_dim=16,
                query_norm=query_norm,
                drop_path=drop_path,
                frozen_stages=frozen_stages,
                checkpoint="vision" in checkpoint,
            ),
            text=RobertaEncoder(
                vocab_size=50,
                dim=16,
                num_layers=6,
                num_heads=2,
                mlp_dim=32,
                max_positions=34,
                image_dims=(32, 32, 64, 64),
                dropout=dropout,
                checkpoint="text" in checkpoint,
            ),
            neck=FeaturePyramid(in_channels=(16, 32, 64), out_channels=16, drop_block=drop_block),
        ),
        head=ATSSLanguageHead(
            tower=DynamicHead(
                channels=16,
                num_blocks=2,
                norm_groups=4,
                zero_init_offsets=False,
                checkpoint="tower" in checkpoint,
            ),
            anchors=AnchorGrid(sizes=(32, 64, 128, 256, 512)),
            text_dim=16,
            loss=GroundingLoss(no_object_column=31),
            postprocessor=PostProcessor(score_thresh=0.0, pre_nms_topk=50, max_detections=20),
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.7)
    return model


@pytest.fixture
def small_model():
    return build_small_model().eval()


@pytest.fixture
def build():
    """``build(query_norm=False, seed=0, ...)``: another small model."""
    return build_small_model
