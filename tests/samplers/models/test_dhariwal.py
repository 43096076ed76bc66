"""The DhariwalUNet against its published size, and against itself."""

from typing import Any

import torch
from pydantic import TypeAdapter

from samplers.models.dhariwal import DhariwalArchitecture, DhariwalUNet


def build(**settings: Any) -> DhariwalUNet:
    kwargs = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, **settings}
    return DhariwalUNet(TypeAdapter(DhariwalArchitecture).validate_python(kwargs)).requires_grad_(False)


def small(**settings: Any) -> DhariwalUNet:
    torch.manual_seed(0)
    return build(
        model_channels=16, channel_mult=[2, 4], num_blocks=1, attn_resolutions=[8, 4], label_dim=5, **settings
    )


def test_the_published_architecture_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        network = build(img_resolution=64, label_dim=1000)
    assert sum(p.numel() for p in network.parameters()) == 295_899_267


def test_blocks_below_64_channels_have_no_attention() -> None:
    attended = {name for name in small().state_dict() if name.endswith("qkv.weight")}
    blocks = {"enc.4x4_block0", "dec.4x4_in0", "dec.4x4_block0", "dec.4x4_block1"}
    assert attended == {f"{block}.qkv.weight" for block in blocks}


def test_the_batch_the_noise_and_the_labels_are_seen() -> None:
    network = small(augment_dim=9)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    noise, labels = torch.tensor([0.3]), torch.eye(5)[[0, 4, 2]]
    together = network(x, noise, labels)
    alone = torch.cat([network(x[i : i + 1], noise, labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (network(x, noise, labels.roll(1, 0)) - together).abs().max() > 1e-4
    assert (network(x, torch.tensor([0.4]), labels) - together).abs().max() > 1e-4
    double = network.double()(x.double(), noise, labels)
    torch.testing.assert_close(together.double(), double, rtol=0, atol=1e-4)


def test_labels_are_added_after_the_mapping_of_the_noise() -> None:
    network = small()
    noise, x = torch.tensor([0.3]), torch.randn(1, 3, 8, 8)
    assert network.map_label is not None
    before = network(x, noise, torch.eye(5)[:1])
    network.map_layer1.bias.add_(network.map_label.weight[:, 0])
    network.map_label.weight.zero_()
    torch.testing.assert_close(network(x, noise, torch.eye(5)[:1]), before)
