"""The towers, the pyramid and the head through torch.compile, without breaks of the graph."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters


def run(model, size, tokens, index):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator)
    ids = torch.randint(3, 50, (len(index), tokens), generator=generator)
    features = model.backbone(images, ids, ids != 1, torch.tensor(index))
    return [*model.head.tower(features.pyramid), features.text]


@pytest.mark.slow
def test_one_graph_for_all_sizes(build):
    """The stance makes an error of compiling again, whatever the sizes.

    No two of the first sizes are equal by chance: what they have in common is taken for a rule.
    """
    model, compiled = build().eval(), build().eval()
    compiled.backbone.compile_backend = compiled.head.tower.compile_backend = "eager"
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        for number, (size, tokens, index) in enumerate(
            [((320, 448), 9, [0, 1, 0, 1, 0, 1]), ((288, 384), 12, [0, 1, 1, 0])]
        ):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                found = run(compiled, size, tokens, index)
            for one, other in zip(found, run(model, size, tokens, index)):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # Image prefix, text prefix, exchange with the pyramid, head.
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


@pytest.mark.slow
def test_gradients_of_compiled_parts(build):
    """In training, through the compiler's backward graphs."""
    gradients = []
    for backend in (None, "aot_eager"):
        model = build().train()
        model.backbone.compile_backend = model.head.tower.compile_backend = backend
        outputs = run(model, (64, 96), 9, [0, 1, 0])
        sum(x.square().mean() for x in outputs).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 200
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5)


def test_copies_are_compiled_for_themselves(build):
    """No copy holds a function of the model it was copied from; weights keep their names."""
    model = build()
    names = list(model.state_dict())
    model.backbone.compile_backend = "eager"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.backbone.compile_backend == "eager"
        assert list(other.state_dict()) == names
        assert not any(callable(value) for value in vars(other.backbone).values())
