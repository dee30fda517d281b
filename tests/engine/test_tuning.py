"""Fine-tuning modes: what learns, what stays, and what is in evaluation mode."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

from fiber_d2.checkpoint import convert_fiber_state_dict, export_fiber_state_dict
from fiber_d2.config import add_fiber_config
from fiber_d2.data import register_all_builtin
from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.default_trainer import run_cfg_node
from fiber_d2.engine.optimizer import published_param_groups
from fiber_d2.engine.overrides import load_config
from fiber_d2.engine.train import run_lazy_config
from fiber_d2.engine.tuning import PROMPT_LENGTH, TUNING, apply_tuning, configure_tuning
from fiber_d2.modeling import RobertaEncoder

COMMON = Path(__file__).parents[2] / "configs" / "common"

# SPEC_DATA_EVAL 6.15, "actually trained", as patterns of our names.
TABLE = {
    "full": r".*",
    "freeze_text": r"(?!backbone\.text\.).*",
    "linear_probe": r"head\.(bbox_pred|centerness|text_projection)\.(weight|bias)"
    r"|head\.(log_scale|text_bias|prior_bias)",
    "language_prompt_v1": r"backbone\.text\..*",
    "language_prompt_v2": r"backbone\.text\.embeddings\.prompt",
    "language_prompt_v3": r"backbone\.text\..*",
    "language_prompt_v4": r"backbone\.text\.embeddings\.prompt",
}


def config(mode=None, **vision):
    cfg = LazyConfig.load(str(COMMON / "models" / "fiber_tiny.py"))
    cfg.train = LazyConfig.load(str(COMMON / "train.py"), "train")
    cfg.model.backbone.vision.update(
        embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], fused_blocks=[0, 0, 1, 1]
    )
    cfg.model.backbone.vision.update(drop_path=0.4, **vision)
    text = {"dim": 32, "num_layers": 3, "num_heads": 2, "mlp_dim": 64, "image_dims": [64, 128]}
    cfg.model.backbone.text.update(dropout=0.1, **text)
    cfg.model.backbone.neck.update(in_channels=[32, 64, 128], out_channels=16, drop_block=0.3)
    cfg.model.head.tower.update(num_blocks=1, norm_groups=4)
    cfg.train.tuning = mode
    return cfg


def tuned(mode, **vision):
    cfg = config(mode, **vision)
    configure_tuning(cfg)
    model = instantiate(cfg.model)
    apply_tuning(model, mode)
    return model


def test_the_table_is_complete():
    assert set(TABLE) == set(TUNING)


@pytest.mark.parametrize("mode", TABLE)
def test_what_learns(mode):
    model = tuned(mode)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = [name for name, _ in model.named_parameters() if re.fullmatch(TABLE[mode], name)]
    assert learning == expected and expected
    groups = published_param_groups(model, base_lr=1.0, weight_decay=0.1, text_lr_factor=0.1)
    assert sum(len(group["params"]) for group in groups) == len(expected)


def test_no_mode_leaves_everything_as_it_is():
    model = tuned(None, frozen_stages=2)
    assert model.backbone.text.embeddings.prompt is None
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(
        name.startswith(("backbone.swin.patch_embed.", "backbone.swin.stages.0."))
        for name in frozen
    )
    apply_tuning(model, "full")
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("mode", TABLE)
def test_frozen_parts_are_in_evaluation_mode(mode):
    model = tuned(mode, frozen_stages=2)
    for _ in range(2):
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()
        assert model.training
        for name, module in model.named_modules():
            learns = [p.requires_grad for p in module.parameters()]
            if learns and not any(learns):
                assert not any(part.training for part in module.modules()), name
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                assert module.training, name


def test_a_frozen_model_is_the_same_function_in_both_modes():
    """Dropout, drop path and DropBlock are all in what linear probing freezes."""
    model = tuned("linear_probe")
    images = torch.rand(2, 3, 64, 64)
    ids, mask = torch.randint(5, 1000, (2, 7)), torch.ones(2, 7, dtype=torch.bool)

    def tokens():
        features = model.backbone(images, ids, mask)
        return model.head(features.pyramid, features.text, mask).token_logits

    model.train()
    first, second = tokens(), tokens()
    model.eval()
    assert torch.equal(first, second) and torch.equal(first, tokens())
    other = tuned("full").train()
    embedded = [other.backbone.text.embeddings(ids) for _ in range(2)]
    assert not torch.equal(*embedded), "the check would not notice dropout"


def test_only_the_prompt_gets_gradients_and_the_rest_of_the_model_lets_them_through():
    model = tuned("language_prompt_v2").train()
    images = torch.rand(1, 3, 64, 64)
    ids, mask = torch.randint(5, 1000, (1, 7)), torch.ones(1, 7, dtype=torch.bool)
    features = model.backbone(images, ids, mask)
    model.head(features.pyramid, features.text, mask).token_logits.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(found) == ["backbone.text.embeddings.prompt"]
    rows = found["backbone.text.embeddings.prompt"].abs().sum(dim=1) > 0
    assert rows.tolist() == [True] * 7 + [False] * (PROMPT_LENGTH - 7)


def test_row_t_is_added_at_place_t_after_the_norm():
    text = RobertaEncoder(dim=8, num_heads=2, num_layers=1, mlp_dim=8, image_dims=[], dropout=0.0)
    with_prompt = RobertaEncoder(
        dim=8, num_heads=2, num_layers=1, mlp_dim=8, image_dims=[], dropout=0.0, prompt_length=1000
    )
    missing, unexpected = with_prompt.load_state_dict(text.state_dict(), strict=False)
    assert (missing, unexpected) == (["embeddings.prompt"], [])
    ids = torch.tensor([[0, 17, 18, 2], [0, 17, 2, 1]])
    plain = text.embeddings(ids)
    assert torch.equal(with_prompt.embeddings(ids), plain), "it starts at zero"
    rows = torch.randn(1000, 8)
    with torch.no_grad():
        with_prompt.embeddings.prompt.copy_(rows)
    assert torch.equal(with_prompt.embeddings(ids), plain + rows[:4])
    with pytest.raises(ValueError, match="prompt_length is 5, but captions may have 512 tokens"):
        RobertaEncoder(prompt_length=5)


def test_the_prompt_learns_at_the_base_rate():
    """SPEC_DATA_EVAL 6.1: tunable_linear is no part of the text tower."""
    (group,) = published_param_groups(
        tuned("language_prompt_v4"), base_lr=0.05, weight_decay=0.25, text_lr_factor=0.1
    )
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.25)
    assert [p.shape for p in group["params"]] == [(1000, 32)]


def test_starts_from_a_checkpoint_without_a_prompt_and_back(tmp_path):
    plain = instantiate(config().model)
    FiberCheckpointer(plain, str(tmp_path)).save("plain")
    model = tuned("language_prompt_v2")
    FiberCheckpointer(model, str(tmp_path)).load(str(tmp_path / "plain.pth"))
    assert torch.equal(plain.head.bbox_pred.weight, model.head.bbox_pred.weight)
    assert not model.backbone.text.embeddings.prompt.any()
    FiberCheckpointer(model, str(tmp_path)).save("tuned")
    with pytest.raises(ValueError, match="unexpected.*embeddings.prompt"):
        FiberCheckpointer(plain, str(tmp_path)).load(str(tmp_path / "tuned.pth"))


def test_the_original_stores_the_prompt_beside_the_towers():
    state = tuned("language_prompt_v2").state_dict()
    theirs = export_fiber_state_dict(state)
    assert theirs["fusion_backbone.tunable_linear.weight"].shape == (1000, 32)
    assert convert_fiber_state_dict(theirs).keys() == state.keys()


def test_both_kinds_of_configurations_get_a_prompt():
    cfg = config("language_prompt_v2")
    assert "prompt_length" not in cfg.model.backbone.text
    configure_tuning(cfg)
    assert cfg.model.backbone.text.prompt_length == PROMPT_LENGTH
    node = get_cfg()
    add_fiber_config(node)
    node.FIBER.TRAIN.TUNING = "language_prompt_v4"
    node.freeze()
    configure_tuning(node)
    assert node.MODEL.FIBER.TEXT.PROMPT_LENGTH == PROMPT_LENGTH and node.is_frozen()


def test_mistakes_are_named():
    model = instantiate(config().model)
    with pytest.raises(ValueError, match="train.tuning=linear_prob is not known.*linear_probe"):
        apply_tuning(model, "linear_prob")
    with pytest.raises(ValueError, match="set model.backbone.text.prompt_length=1000"):
        apply_tuning(model, "language_prompt_v2")
    with pytest.raises(ValueError, match="a Linear has others"):
        apply_tuning(nn.Linear(1, 1), "full")
    cfg = config("language_prompt_v2")
    cfg.model = {"_target_": "torch.nn.Linear"}
    with pytest.raises(ValueError, match="has no argument prompt_length"):
        configure_tuning(cfg)


# The rest trains.

YAML = """
MODEL:
  DEVICE: "cpu"
  FIBER:
    VISION:
      {EMBED_DIM: 16, DEPTHS: [1, 1, 2, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW: 2,
        FUSED_BLOCKS: [0, 0, 1, 1], DROP_PATH: 0.0}
    TEXT: {VOCAB_SIZE: 2000, DIM: 32, NUM_LAYERS: 2, NUM_HEADS: 2, MLP_DIM: 64}
    NECK: {OUT_CHANNELS: 16}
    TOWER: {NUM_BLOCKS: 1, NORM_GROUPS: 4}
FIBER:
  TOKENIZER: "shapes"
DATASETS:
  TRAIN: ("shapes_detection_train",)
INPUT: {MIN_SIZE_TRAIN: [64]}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 4, BASE_LR: 0.01, MAX_ITER: 2, STEPS: [1], WARMUP_ITERS: 0}
VERSION: 2
"""


@pytest.fixture
def shapes(datasets_root):
    register_all_builtin(str(datasets_root))
    yield
    register_all_builtin()


def changed(before, after):
    """Names of weights that a training has moved, and of those that it has added."""
    states = [torch.load(path, weights_only=True)["model"] for path in (before, after)]
    return [
        name
        for name, x in states[1].items()
        if name not in states[0] or not torch.equal(x, states[0][name])
    ]


def save_start(model, folder):
    """Weights of open towers: with the published ones, of 0, the prompt could not reach boxes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.5)
    FiberCheckpointer(model, str(folder)).save("start")
    return folder / "start.pth"


def overrides_of(mode, start, folder):
    found = [f"train.tuning={mode}", "train.max_iter=2", "dataloader.test=null"]
    found += ["optimizer.lr=0.05", "lr_multiplier.warmup_iters=0"]
    return [*found, f"train.init_checkpoint={start}", f"train.output_dir={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["linear_probe", "freeze_text", "language_prompt_v1"])
def test_only_what_learns_changes(mode, config_file, shapes, tmp_path):
    start = save_start(instantiate(load_config(str(config_file), []).model), tmp_path)
    run_lazy_config(load_config(str(config_file), overrides_of(mode, start, tmp_path)))
    moved = changed(start, tmp_path / "model_final.pth")
    assert moved and all(re.fullmatch(TABLE[mode], name) for name in moved)


@pytest.mark.slow
def test_only_the_prompt_changes_in_two_processes(config_file, run, shapes, tmp_path):
    start = save_start(instantiate(load_config(str(config_file), []).model), tmp_path)
    overrides = overrides_of("language_prompt_v2", start, tmp_path / "tuned")
    code, _, err = run("--config-file", config_file, "--num-gpus", 2, *overrides)
    assert code == 0, err
    final = tmp_path / "tuned" / "model_final.pth"
    assert changed(start, final) == ["backbone.text.embeddings.prompt"]
    # What was tuned is evaluated by the same configuration.
    tested = overrides_of("language_prompt_v2", final, tmp_path / "tested")
    cfg = load_config(str(config_file), [x for x in tested if "dataloader" not in x])
    run_lazy_config(cfg, eval_only=True)
    assert (tmp_path / "tested" / "inference" / "shapes_detection_val" / "results.json").exists()


@pytest.mark.slow
def test_only_the_prompt_changes_of_a_yaml_configuration(shapes, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    overrides = ["FIBER.TRAIN.TUNING=language_prompt_v4", f"OUTPUT_DIR={tmp_path / 'tuned'}"]
    start = save_start(build_model(load_config(str(path), overrides)), tmp_path)
    run_cfg_node(load_config(str(path), [*overrides, f"MODEL.WEIGHTS={start}"]))
    moved = changed(start, tmp_path / "tuned" / "model_final.pth")
    assert moved == ["backbone.text.embeddings.prompt"]
    assert "PROMPT_LENGTH: 1000" in (tmp_path / "tuned" / "config.yaml").read_text()
