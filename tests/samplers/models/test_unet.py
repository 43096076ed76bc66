"""The U-Net and the classifier against the official outputs, and against themselves."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samplers.errors import InputError
from samplers.models.adm import AdmOptions
from samplers.models.options import parse_options
from samplers.models.unet import (
    Architecture,
    AttentionBlock,
    AttentionPool,
    Classifier,
    ResBlock,
    UNet,
    timestep_embedding,
)

SMALL = Architecture(3, 6, 32, (1, 2), 1, (2,), num_head_channels=16, resblock_updown=True, num_classes=5)


@pytest.mark.parametrize("case", ["cifar10_adm", "imagenet64_cond", "cond_no_scale_shift", "classifier64"])
def test_published_architectures_give_the_official_output(shared: Path, formula: Any, case: str) -> None:
    folder = shared / "reference/vectors/formula_nets"
    about = json.loads((folder / "meta.json").read_text())["files"]["adm.npz"]["cases"][case]
    options = parse_options(AdmOptions, "adm", about["flags"])
    network: nn.Module
    with torch.device("meta"):
        if case == "classifier64":
            network = Classifier(options.classifier(3), options.image_size)
        else:
            network = UNet(options.network(3))
    state = formula.weights(network)
    assert (len(state), sum(value.numel() for value in state.values())) == (
        about["num_tensors"],
        about["num_params"],
    )
    network.load_state_dict(state, assign=True)
    shape = tuple(about["x_shape"])
    x = torch.from_numpy((math.sqrt(3) * formula.uniform("input:x", shape)).astype(np.float32))
    labels = [] if about.get("y") is None else [torch.tensor([about["y"]])]
    with torch.no_grad():
        out = network(x, torch.tensor(about["t"]), *labels)
    if case != "classifier64":
        out = out[..., :: about["stride"], :: about["stride"]]
    with np.load(folder / "adm.npz") as arrays:
        expected = torch.from_numpy(arrays[about["out_key"]])
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5 * about["out_max_abs"])


@pytest.fixture(scope="module")
def small() -> UNet:
    torch.manual_seed(0)
    return UNet(SMALL).requires_grad_(False)


def _batch() -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 8, 8, generator=numbers), torch.tensor([0, 4, 2])


def test_images_of_a_batch_do_not_touch_each_other(small: UNet) -> None:
    x, labels = _batch()
    together = small(x, torch.tensor(321.0), labels)
    alone = torch.cat([small(x[i : i + 1], torch.tensor(321.0), labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_labels_and_times_change_the_answer(small: UNet) -> None:
    x, labels = _batch()
    base = small(x, torch.tensor(321.0), labels)
    assert (base - small(x, torch.tensor(321.0), labels.roll(1))).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (base - small(x, torch.tensor(12.0), labels)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_one_time_stands_for_a_batch_of_that_time(small: UNet) -> None:
    x, labels = _batch()
    once = small(x, torch.tensor(77.5), labels)
    torch.testing.assert_close(once, small(x, torch.full((3,), 77.5), labels), rtol=0, atol=1e-5)
    times = torch.tensor([5.0, 77.5, 900.0])
    torch.testing.assert_close(once[1], small(x, times, labels)[1], rtol=0, atol=1e-5)


def test_the_memory_layout_of_the_input_does_not_matter(small: UNet) -> None:
    x, labels = _batch()
    assert torch.equal(
        small(x, torch.tensor(9.0), labels),
        small(x.contiguous(memory_format=torch.channels_last), torch.tensor(9.0), labels),
    )


def test_float32_and_bfloat16_stay_near_float64() -> None:
    x, labels = _batch()
    torch.manual_seed(0)
    exact = UNet(SMALL).requires_grad_(False).double()
    time = torch.tensor(987.0)
    reference = exact(x.double(), time, labels)
    size = float(reference.abs().max())
    torch.testing.assert_close(exact.float()(x, time, labels).double(), reference, rtol=0, atol=1e-5 * size)
    coarse = exact.bfloat16()(x, time, labels)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.double(), reference, rtol=0, atol=0.05 * size)


def test_nothing_in_a_forward_pass_reads_a_value_back_from_the_device() -> None:
    # Fake tensors have no values: a host synchronisation (.item(), a branch on data) raises.
    with FakeTensorMode():
        network = UNet(SMALL)
        out = network(torch.empty(4, 3, 8, 8), torch.empty(()), torch.zeros(4, dtype=torch.int64))
    assert out.shape == (4, 6, 8, 8)


def test_a_class_conditional_network_insists_on_labels(small: UNet) -> None:
    with pytest.raises(AssertionError, match="needs labels"):
        small(torch.zeros(1, 3, 8, 8), torch.tensor(0.0))


def test_the_time_embedding_is_cosines_then_sines_of_falling_frequencies() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 3.0], dtype=torch.float64), 4)
    assert embedding[0].tolist() == [1, 1, 0, 0]
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    assert embedding[1].tolist() == pytest.approx(expected, abs=1e-12)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·k / sqrt(d)) v for one image and one head, all [d, N]."""
    return torch.einsum("nm,dm->dn", (q.T @ k / math.sqrt(len(q))).softmax(dim=1), v)


@pytest.mark.parametrize("new_order", [True, False])
def test_attention_is_softmax_of_scaled_products_in_both_channel_orders(new_order: bool) -> None:
    torch.manual_seed(0)
    net = Architecture(3, 3, 32, (1,), 1, (), num_head_channels=16, use_new_attention_order=new_order)
    block = AttentionBlock(32, 1, net).double()
    x = torch.randn(1, 32, 2, 3, dtype=torch.float64)
    qkv = block.qkv(block.norm(x).flatten(2))[0]
    # [3, heads, d, N], from (q, k, v) × heads or heads × (q, k, v)
    parts = qkv.view(3, 2, 16, 6) if new_order else qkv.view(2, 3, 16, 6).transpose(0, 1)
    heads = [_plain_attention(*parts[:, head]) for head in range(2)]
    expected = x + block.proj_out(torch.cat(heads)[None]).view_as(x)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)


def test_the_attention_pool_answers_for_the_mean_of_all_positions() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(positions=4, channels=128, classes=7).double()
    nn.init.normal_(pool.positional_embedding)
    x = torch.randn(2, 128, 2, 2, dtype=torch.float64)
    tokens = torch.cat([x.flatten(2).mean(dim=2, keepdim=True), x.flatten(2)], dim=2)
    qkv = pool.qkv_proj(tokens + pool.positional_embedding).view(2, 3, 2, 64, 5)
    mixed = torch.stack(
        [torch.cat([_plain_attention(*qkv[image, :, head]) for head in range(2)]) for image in range(2)]
    )
    torch.testing.assert_close(pool(x), pool.c_proj(mixed)[:, :, 0], rtol=1e-10, atol=1e-12)


def _silent(block: ResBlock) -> ResBlock:
    """The block with its last convolution at zero: only the skip is left."""
    last = block.out_layers[3]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return block


def test_a_resampling_block_averages_or_repeats_what_its_skip_carries() -> None:
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(1, 128)
    down = _silent(ResBlock(64, 64, SMALL, "down"))((x,), emb)
    torch.testing.assert_close(down, x.view(2, 64, 2, 2, 2, 2).mean(dim=(3, 5)))
    up = _silent(ResBlock(64, 64, SMALL, "up"))((x,), emb)
    assert torch.equal(up, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.equal(_silent(ResBlock(64, 64, SMALL))((x,), emb), x)


def test_the_first_half_of_the_embedding_scales_and_the_second_shifts() -> None:
    torch.manual_seed(0)
    block = ResBlock(32, 32, SMALL).double()
    x, emb = torch.randn(2, 32, 4, 4, dtype=torch.float64), torch.randn(1, 128, dtype=torch.float64)
    scale, shift = block.emb_layers(emb)[0].view(2, 32, 1, 1)
    hidden = block.out_layers[0](block.in_layers(x)) * (1 + scale) + shift
    torch.testing.assert_close(block((x,), emb), x + block.out_layers[1:](hidden), rtol=1e-12, atol=1e-12)


def test_without_scale_shift_the_embedding_is_added_before_the_normalisation() -> None:
    torch.manual_seed(0)
    net = Architecture(3, 3, 64, (1,), 1, (), use_scale_shift_norm=False)
    block = ResBlock(64, 64, net).double()
    x, emb = torch.randn(2, 64, 4, 4, dtype=torch.float64), torch.randn(1, 256, dtype=torch.float64)
    hidden = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
    torch.testing.assert_close(block((x,), emb), x + block.out_layers(hidden), rtol=1e-12, atol=1e-12)


def test_widths_that_normalisation_cannot_group_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"num_channels 32 times channel_mult 0\.5"):
        Architecture(3, 3, 32, (0.5, 1), 1, ())


def test_heads_that_do_not_divide_the_channels_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="num_head_channels 48 does not divide 32 channels"):
        UNet(Architecture(3, 3, 32, (1,), 1, (), num_head_channels=48))
    with pytest.raises(InputError, match="5 attention heads"):
        UNet(Architecture(3, 3, 32, (1,), 1, (), num_heads=5, num_heads_upsample=5))
    with pytest.raises(InputError, match="96, is not a multiple of 64"):
        Classifier(Architecture(3, 10, 32, (1, 3), 1, (), num_head_channels=32), 8)
