import pytest
import torch
from torchvision.ops import deform_conv2d

from fiber_d2.layers import flat_offset_view, modulated_deform_conv2d, resampled_offset_view


@pytest.mark.parametrize(
    ("height", "width", "stride", "spread"),
    [(7, 9, 1, 0.0), (7, 9, 1, 1.5), (8, 5, 2, 1.5), (1, 1, 1, 2.0), (6, 6, 2, 40.0)],
)
def test_agrees_with_torchvision_forward_and_backward(height, width, stride, spread):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    out_h, out_w = (height + 2 - 3) // stride + 1, (width + 2 - 3) // stride + 1
    inputs = {
        "x": draw(2, 4, height, width),
        "offset": draw(2, 18, out_h, out_w) * spread,
        "mask": draw(2, 9, out_h, out_w).sigmoid(),
        "weight": draw(6, 4, 3, 3),
        "bias": draw(6),
    }
    grad = draw(2, 6, out_h, out_w)
    results = []
    for run in (
        lambda v: modulated_deform_conv2d(**v, stride=stride),
        lambda v: deform_conv2d(
            v["x"], v["offset"], v["weight"], v["bias"], stride, 1, mask=v["mask"]
        ),
    ):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        out = run(leaves)
        out.backward(grad)
        results.append((out.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs)
    for name in inputs:
        if name == "offset" and spread == 0:
            # On whole pixels the bilinear weight has a kink; any one-sided slope is right.
            continue
        torch.testing.assert_close(our_grads[name], their_grads[name], msg=name)


def test_without_offsets_it_is_a_convolution():
    x, weight, bias = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    out = modulated_deform_conv2d(x, torch.zeros(1, 18, 5, 6), torch.ones(1, 9, 5, 6), weight, bias)
    torch.testing.assert_close(
        out, torch.nn.functional.conv2d(x, weight, bias, padding=1), atol=1e-5, rtol=1e-5
    )


def test_flat_view_reads_the_memory_of_each_image():
    tensor = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    view = flat_offset_view(tensor, 2, 3)
    memory = tensor.numpy().reshape(2, -1)
    for image in range(2):
        for channel in range(3):
            for row in range(2):
                for column in range(3):
                    address = channel * 6 + row * 3 + column
                    assert view[image, channel, row, column] == memory[image, address]
    # The logical order counts, whatever the memory format.
    shuffled = tensor.to(memory_format=torch.channels_last)
    assert torch.equal(flat_offset_view(shuffled, 2, 3), view)


def test_flat_and_resampled_views_coincide_at_one_pixel():
    tensor = torch.randn(2, 18, 1, 1)
    assert torch.equal(flat_offset_view(tensor, 1, 1), tensor)
    assert torch.equal(resampled_offset_view(tensor, 1, 1), tensor)
