"""samplers.models.normalisation: what a compiler traces equals what torch's own operations give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samplers.models.normalisation import joined, normalised, projected, whole


def images(*channels):
    generator = torch.Generator().manual_seed(len(channels))
    return [
        3
        + torch.randn(2, c, 5, 4, generator=generator, dtype=torch.float64).to(
            memory_format=torch.channels_last
        )
        for c in channels
    ]


def traced(function, *arguments):
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True)(*arguments)


# With 12 channels in 3 groups, the second pair meets inside a group.
@pytest.mark.parametrize("channels", [(12,), (8, 4), (6, 6), (1, 11)])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_the_traced_form_equals_group_normalisation(channels, modulated, silu):
    norm = nn.GroupNorm(3, 12, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(5))
        norm.bias.normal_(generator=torch.Generator().manual_seed(6))
    scale, shift = torch.randn(2, 2, 12, 1, 1, dtype=torch.float64) if modulated else (None, None)
    parts = images(*channels)

    def run(*parts):
        return normalised(norm, joined(*parts), scale=scale, shift=shift, silu=silu)

    expected = F.group_norm(torch.cat(parts, 1), 3, norm.weight, norm.bias, 1e-3)
    if modulated:
        expected = expected * (1 + scale) + shift
    if silu:
        expected = F.silu(expected)
    torch.testing.assert_close(run(*parts), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(traced(run, *parts), expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_normalised_in_float32_when_traced():
    norm = nn.GroupNorm(2, 8)
    (x,) = images(8)
    x = 40 * x  # squares that half precision has no numbers for
    result = traced(lambda x: normalised(norm, (x,)), x.half())
    assert result.dtype == torch.float16
    exact = F.silu(F.group_norm(x.half().double(), 2, norm.weight.double(), norm.bias.double()))
    assert (result.double() - exact).abs().max() <= 2**-10 * exact.abs().max()


def test_a_projection_of_parts_is_that_of_the_whole():
    conv = nn.Conv2d(12, 7, 1).double()
    parts = images(8, 4)
    expected = conv(torch.cat(parts, 1))
    for run in (lambda *parts: projected(conv, joined(*parts)), lambda *parts: conv(whole(joined(*parts)))):
        torch.testing.assert_close(run(*parts), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(traced(run, *parts), expected, rtol=1e-12, atol=1e-12)
