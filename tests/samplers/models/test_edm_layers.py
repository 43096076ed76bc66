"""The layers of EDM's U-Nets against plain formulas."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.models.edm_layers import (
    Block,
    Conv,
    FourierEmbedding,
    FusedDown,
    Resampler,
    Style,
    levels,
    norm,
    positional_embedding,
)

SONG = Style(16, math.sqrt(0.5), 1e-6, False, True, (1, 1), None)
ADM = Style(16, 1.0, 1e-5, True, False, (1, 1), 4)


def _images(channels: int, side: int = 6) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_levels_halve_the_side_and_know_their_attention() -> None:
    assert levels(32, 64, (1, 2, 2), (16, 5)) == [(32, 64, False), (16, 128, True), (8, 128, False)]


@pytest.mark.parametrize(("endpoint", "last"), [(True, 10_000), (False, 10_000 ** (7 / 8))])
def test_positional_frequencies_end_at_the_end_point_or_one_before_it(endpoint: bool, last: float) -> None:
    embedding = positional_embedding(torch.tensor([3.0], dtype=torch.float64), 16, endpoint=endpoint)[0]
    assert embedding[0].item() == pytest.approx(math.cos(3))
    assert embedding[8].item() == pytest.approx(math.sin(3))
    assert embedding[7].item() == pytest.approx(math.cos(3 / last), rel=1e-12)
    assert embedding[15].item() == pytest.approx(math.sin(3 / last), rel=1e-12)


def test_fourier_frequencies_are_turns() -> None:
    embedding = FourierEmbedding(4)
    embedding.freqs.copy_(torch.tensor([0.25, 1.0]))
    found = embedding(torch.tensor([1.0]))[0]
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 1.0, 0.0]), rtol=0, atol=1e-6)


def test_groups_have_four_channels_until_there_are_32() -> None:
    assert [norm(channels, 1e-6).num_groups for channels in (8, 64, 128, 512)] == [2, 16, 32, 32]


def test_the_short_filter_is_a_mean_and_a_repetition() -> None:
    x = _images(3)
    down, up = Resampler("down", (1, 1)), Resampler("up", (1, 1))
    torch.testing.assert_close(down(x), F.avg_pool2d(x, 2))
    torch.testing.assert_close(up(x), F.interpolate(x, scale_factor=2.0, mode="nearest"))


def test_the_long_filter_keeps_a_slope_inside_the_image() -> None:
    ramp = torch.arange(12.0)[None, None, None, :].expand(1, 1, 12, 12)
    inside = slice(1, -1)
    half = Resampler("down", (1, 3, 3, 1))(ramp)[0, 0, inside, inside]
    torch.testing.assert_close(half, ramp[0, 0, ::2, ::2][inside, inside] + 0.5)
    twice = Resampler("up", (1, 3, 3, 1))(ramp)[0, 0, 2:-2, 2:-2]
    expected = torch.arange(24.0)[2:-2] / 2 - 0.25
    torch.testing.assert_close(twice, expected.expand(20, 20))


def test_an_ordinary_convolution_resamples_first() -> None:
    x = _images(3)
    for direction in ("down", "up"):
        conv = Conv(3, 4, 3, direction, (1, 3, 3, 1))  # type: ignore[arg-type]
        resampled = Resampler(direction, (1, 3, 3, 1))(x)  # type: ignore[arg-type]
        torch.testing.assert_close(conv(x), F.conv2d(resampled, conv.weight, conv.bias, padding=1))


def test_a_fused_convolution_halves_last_and_pads_once() -> None:
    x = _images(3)
    conv = FusedDown(3, 4, 3, (1, 3, 3, 1))
    wide = F.conv2d(F.pad(x, (2, 2, 2, 2)), conv.weight, conv.bias)  # one pixel more on each side
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    expected = torch.einsum("bchwij,i,j->bchw", wide.unfold(2, 4, 2).unfold(3, 4, 2), taps, taps)
    assert expected.shape == (2, 4, 3, 3)
    torch.testing.assert_close(conv(x), expected)


def test_the_attention_of_a_block_is_softmax_over_positions() -> None:
    for style, heads in ((SONG, 1), (ADM, 2)):
        block = Block(8, 8, style, attention=True)
        assert block.heads == heads
        x = _images(8, 3)
        qkv = block.qkv(x).reshape(2, heads, 8 // heads, 3, 9)
        q, k, v = qkv.unbind(3)
        weights = (q.transpose(2, 3) @ k / math.sqrt(8 / heads)).softmax(dim=3)
        expected = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, 8, 3, 3)
        torch.testing.assert_close(block._attention(x), expected, rtol=1e-4, atol=1e-6)


def test_fewer_channels_than_a_head_has_mean_no_attention() -> None:
    block = Block(8, 8, replace(ADM, channels_per_head=64), attention=True)
    assert block.heads == 0
    assert not any("qkv" in name for name, _ in block.named_parameters())
    assert Block(8, 8, SONG).heads == 0


def test_a_block_without_branches_passes_its_input_on_scaled() -> None:
    for style in (SONG, ADM):
        block = Block(8, 8, style, attention=True)
        torch.nn.init.zeros_(block.conv1.weight)
        torch.nn.init.zeros_(block.proj.weight)
        assert block.conv1.bias is not None
        assert block.proj.bias is not None
        torch.nn.init.zeros_(block.conv1.bias)
        torch.nn.init.zeros_(block.proj.bias)
        x = _images(8)
        torch.testing.assert_close(block((x,), torch.randn(1, 16)), x * style.skip_scale**2)


def test_the_embedding_is_added_before_the_normalisation_or_scales_after_it() -> None:
    emb = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    x = _images(8)
    for style in (SONG, ADM):
        block = Block(8, 8, style)
        params = block.affine(emb)[:, :, None, None]
        h = block.conv0(F.silu(block.norm0(x)))
        late = style.adaptive_scale
        h = block.norm1(h) * (1 + params[:, :8]) + params[:, 8:] if late else block.norm1(h + params)
        torch.testing.assert_close(block((x,), emb), (x + block.conv1(F.silu(h))) * style.skip_scale)


def test_a_skip_has_weights_where_channels_change_or_the_style_asks_for_it() -> None:
    assert Block(8, 8, SONG).skip is None
    assert isinstance(Block(8, 8, SONG, "down").skip, Conv)
    assert isinstance(Block(8, 8, ADM, "down").skip, Resampler)
    assert isinstance(Block(8, 12, ADM).skip, Conv)
    assert isinstance(Block(8, 12, ADM, "up").skip, Conv)
