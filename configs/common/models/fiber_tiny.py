"""The same architecture at about 6 M parameters, for the quickstart and for tests."""

from .fiber_b import model

model.backbone.vision.update(
    embed_dim=32,
    depths=[2, 2, 6, 2],
    num_heads=[1, 2, 4, 8],
    # A window covers the whole map of stage 3 at 128 pixels; stage 4 is padded to one window.
    window=8,
    fused_blocks=[0, 0, 2, 2],
    # From scratch the exchange starts open.
    alpha_init=0.5,
    drop_path=0.0,
)
model.backbone.text.update(
    vocab_size=2000,
    dim=128,
    num_layers=6,
    num_heads=4,
    mlp_dim=512,
    max_positions=258,
    image_dims=[128, 128, 256, 256],
    dropout=0.0,
    alpha_init=0.5,
)
model.backbone.neck.update(in_channels=[64, 128, 256], out_channels=64, drop_block=0.0)
model.head.tower.update(num_blocks=2, norm_groups=8)
model.head.text_projection_std = 0.3
model.head.anchors.update(sizes=[32, 64, 128, 256, 512])
