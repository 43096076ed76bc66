"""The SongUNet against official outputs, and against itself."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from samplers.models.song import SongArchitecture, SongUNet

NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def small(**settings: Any) -> SongUNet:
    kwargs = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8}
    kwargs |= {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    torch.manual_seed(0)
    network = SongUNet(TypeAdapter(SongArchitecture).validate_python(kwargs | settings))
    return network.requires_grad_(False)


def batch() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        # EDM's CIFAR-10 networks: class-conditional DDPM++ and unconditional NCSN++.
        ({"label_dim": 10}, 55_735_299),
        (NCSNPP, 56_397_827),
    ],
)
def test_published_architectures_have_their_number_of_parameters(
    settings: dict[str, Any], parameters: int
) -> None:
    published = {"img_resolution": 32, "in_channels": 3, "out_channels": 3, "channel_mult": [2, 2, 2]}
    with torch.device("meta"):
        network = SongUNet(
            TypeAdapter(SongArchitecture).validate_python({**published, "augment_dim": 9, **settings})
        )
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_every_type_answers_images_one_by_one(encoder: str, decoder: str, embedding: str) -> None:
    network = small(
        encoder_type=encoder, decoder_type=decoder, embedding_type=embedding, resample_filter=[1, 3, 3, 1]
    )
    together = network(batch(), torch.tensor([0.3]))
    assert together.shape == (3, 3, 8, 8)
    alone = torch.cat([network(x[None], torch.tensor([0.3])) for x in batch()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (network(batch(), torch.tensor([0.4])) - together).abs().max() > 1e-4


def test_the_image_is_halved_into_the_encoder_where_the_type_says_so() -> None:
    plain = set(small().state_dict())
    skip = set(small(encoder_type="skip").state_dict()) - plain
    assert skip == {
        "enc.4x4_aux_down.resample_filter",
        "enc.4x4_aux_skip.weight",
        "enc.4x4_aux_skip.bias",
    }
    residual = set(small(encoder_type="residual").state_dict()) - plain
    assert {name.rpartition(".")[0] for name in residual} == {"enc.4x4_aux_residual"}
    for kind, layer in (("skip", "4x4_aux_skip"), ("residual", "4x4_aux_residual")):
        network = small(encoder_type=kind)
        before = network(batch(), torch.tensor([0.3]))
        network.enc[layer].weight.mul_(2)
        assert (network(batch(), torch.tensor([0.3])) - before).abs().max() > 1e-5


def test_a_decoder_with_skips_adds_what_every_level_draws() -> None:
    network = small(decoder_type="skip")
    for level, value in (("8x8", 0.25), ("4x4", 2.0)):
        layer: Any = network.dec[f"{level}_aux_conv"]
        layer.weight.zero_()
        layer.bias.fill_(value)
    out = network(batch(), torch.tensor([0.3]))
    torch.testing.assert_close(out, torch.full_like(out, 2.25))


def test_attention_in_the_decoder_is_only_in_the_last_block_of_a_level() -> None:
    names = small(num_blocks=2, attn_resolutions=[8]).state_dict()
    attended = {name.removesuffix(".qkv.weight") for name in names if name.endswith(".qkv.weight")}
    assert attended == {"enc.8x8_block0", "enc.8x8_block1", "dec.4x4_in0", "dec.8x8_block2"}


def test_labels_change_the_answer_and_the_training_s_augmentation_does_not() -> None:
    network = small(label_dim=5, augment_dim=9)
    one_hot = torch.eye(5)[[0, 4, 2]]
    before = network(batch(), torch.tensor([0.3]), one_hot)
    assert (network(batch(), torch.tensor([0.3]), one_hot.roll(1, 0)) - before).abs().max() > 1e-4
    assert network.map_augment is not None
    network.map_augment.weight.fill_(7)
    torch.testing.assert_close(network(batch(), torch.tensor([0.3]), one_hot), before, rtol=0, atol=0)


def test_a_network_in_double_precision_is_near_the_one_in_single() -> None:
    network = small(**NCSNPP, label_dim=5)
    single = network(batch(), torch.tensor([0.3]), torch.eye(5)[:3])
    double = network.double()(batch().double(), torch.tensor([0.3]), torch.eye(5)[:3])
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"channel_mult": []},
        {"channel_mult": [1] * 17},
        {"num_blocks": 65},
        {"model_channels": 1 << 20},
        {"encoder_type": "other"},
        {"patch_size": 2},
    ],
)
def test_arguments_that_no_network_has_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        small(**settings)
