from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model

from fiber_d2.config import add_fiber_config
from fiber_d2.structures import Prompt

CONFIGS = Path(__file__).parents[2] / "configs"

# fiber_tiny.py in CfgNode keys.
TINY = [
    *("MODEL.FIBER.VISION.EMBED_DIM", 32),
    *("MODEL.FIBER.VISION.DEPTHS", [2, 2, 6, 2]),
    *("MODEL.FIBER.VISION.NUM_HEADS", [1, 2, 4, 8]),
    *("MODEL.FIBER.VISION.WINDOW", 8),
    *("MODEL.FIBER.VISION.FUSED_BLOCKS", [0, 0, 2, 2]),
    *("MODEL.FIBER.VISION.DROP_PATH", 0.0),
    *("MODEL.FIBER.TEXT.VOCAB_SIZE", 2000),
    *("MODEL.FIBER.TEXT.DIM", 128),
    *("MODEL.FIBER.TEXT.NUM_LAYERS", 6),
    *("MODEL.FIBER.TEXT.NUM_HEADS", 4),
    *("MODEL.FIBER.TEXT.MLP_DIM", 512),
    *("MODEL.FIBER.TEXT.MAX_POSITIONS", 258),
    *("MODEL.FIBER.TEXT.DROPOUT", 0.0),
    *("MODEL.FIBER.NECK.OUT_CHANNELS", 64),
    *("MODEL.FIBER.NECK.DROP_BLOCK", 0.0),
    *("MODEL.FIBER.TOWER.NUM_BLOCKS", 2),
    *("MODEL.FIBER.TOWER.NORM_GROUPS", 8),
    *("MODEL.FIBER.ANCHORS.SIZES", [32, 64, 128, 256, 512]),
]


def from_yaml(overrides):
    cfg = get_cfg()
    add_fiber_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "FIBER-B.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    return build_model(cfg)


def from_python(name):
    return instantiate(LazyConfig.load(str(CONFIGS / "common/models" / name)).model)


def assert_equal_models(ours, theirs, size):
    state = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    ours.load_state_dict(state)
    ours.eval(), theirs.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for model in (ours, theirs):
            model.head.postprocessor.score_thresh = 0.0
            for name, parameter in model.named_parameters():
                if name.endswith("alpha"):
                    parameter.fill_(0.5)
    positive_map = torch.zeros(2, 6)
    positive_map[0, 1:3], positive_map[1, 4] = 0.5, 1.0
    prompt = Prompt(
        "two things",
        torch.tensor([0, 10, 11, 12, 13, 2]),
        torch.ones(6, dtype=torch.bool),
        positive_map,
        torch.arange(2),
    )
    item = {"image": torch.randint(0, 256, (3, size, size), dtype=torch.uint8), "prompt": prompt}
    first, second = (model([item])[0]["instances"] for model in (ours, theirs))
    assert len(first) > 0
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    assert torch.equal(first.scores, second.scores)


def test_registries_know_the_parts():
    from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY

    assert META_ARCH_REGISTRY.get("FIBER")
    assert BACKBONE_REGISTRY.get("build_fiber_fusion_backbone")
    assert PROPOSAL_GENERATOR_REGISTRY.get("ATSSLanguageHead")


def test_both_configurations_build_the_same_small_model():
    lazy = from_python("fiber_tiny.py")
    assert 3e6 < sum(p.numel() for p in lazy.parameters()) < 6.5e6
    assert_equal_models(from_yaml(TINY), lazy, 64)


@pytest.mark.slow
def test_both_configurations_build_the_same_fiber_b():
    lazy = from_python("fiber_b.py")
    count = sum(p.numel() for p in lazy.parameters())
    assert 240e6 < count < 280e6
    assert_equal_models(from_yaml([]), lazy, 96)


def test_both_configurations_turn_on_checkpointing():
    keys = [f"MODEL.FIBER.{part}.CHECKPOINT" for part in ("VISION", "TEXT", "TOWER")]
    cfg = LazyConfig.load(str(CONFIGS / "common/models/fiber_tiny.py"))
    cfg.model.backbone.vision.checkpoint = cfg.model.backbone.text.checkpoint = True
    cfg.model.head.tower.checkpoint = True
    overrides = [value for key in keys for value in (key, True)]
    for model, on in (
        (from_yaml([*TINY, *overrides]), True),
        (instantiate(cfg.model), True),
        (from_yaml(TINY), False),
    ):
        parts = (model.backbone.swin, model.backbone.text, model.head.tower)
        assert [part.checkpoint for part in parts] == [on] * 3


def test_both_configurations_turn_on_compilation():
    cfg = LazyConfig.load(str(CONFIGS / "common/models/fiber_tiny.py"))
    cfg.model.compile_backend = "inductor"
    overrides = ["MODEL.FIBER.COMPILE_BACKEND", "inductor"]
    for model, backend in (
        (instantiate(cfg.model), "inductor"),
        (from_yaml([*TINY, *overrides]), "inductor"),
        (from_yaml(TINY), None),
    ):
        assert model.backbone.compile_backend == model.head.tower.compile_backend == backend
    with pytest.raises(ValueError, match="compile_backend is 'indictor', but .*inductor"):
        cfg.model.compile_backend = "indictor"
        instantiate(cfg.model)


def test_both_configurations_choose_the_precision_of_evaluation():
    cfg = LazyConfig.load(str(CONFIGS / "common/models/fiber_tiny.py"))
    assert instantiate(cfg.model).inference_precision is None
    assert from_yaml(TINY).inference_precision is None
    cfg.model.inference_precision = "float16"
    assert instantiate(cfg.model).inference_precision == "float16"
    yaml = [*TINY, "MODEL.FIBER.INFERENCE_PRECISION", "bfloat16"]
    assert from_yaml(yaml).inference_precision == "bfloat16"
    cfg.model.inference_precision = "float8"
    with pytest.raises(ValueError, match="'float8' is not known; choose bfloat16 or float16"):
        instantiate(cfg.model)


def test_unfitting_towers_are_refused():
    with pytest.raises(ValueError, match="fused blocks have widths"):
        cfg = LazyConfig.load(str(CONFIGS / "common/models/fiber_tiny.py"))
        cfg.model.backbone.text.image_dims = [128, 128, 128, 256]
        instantiate(cfg.model)


def test_frozen_stages():
    cfg = LazyConfig.load(str(CONFIGS / "common/models/fiber_tiny.py"))
    cfg.model.backbone.vision.frozen_stages = 2
    model = instantiate(cfg.model).train()
    swin = model.backbone.swin
    assert not any(p.requires_grad for p in swin.patch_embed.parameters())
    assert not any(p.requires_grad for p in swin.stages[0].parameters())
    assert all(p.requires_grad for p in swin.stages[1].parameters())
    assert not swin.stages[0].training and swin.stages[1].training
