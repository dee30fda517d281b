import importlib.util
from pathlib import Path

import pytest
import torch

_PATH = Path(__file__).parents[1] / "modeling" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("small_model", _PATH)
_SMALL = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_SMALL)

ANCHORS = {"anchor_sizes": (32, 64, 128, 256, 512)}


@pytest.fixture
def build():
    """The small model of tests/modeling, weights at random: ``build(query_norm, seed)``."""

    def build(query_norm=False, seed=0):
        model = _SMALL.build_small_model(query_norm, seed).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    return build


@pytest.fixture
def export():
    """A model's weights as the original would save them."""
    from fiber_d2.checkpoint import export_fiber_state_dict

    return lambda model: export_fiber_state_dict(model.state_dict(), **ANCHORS)
