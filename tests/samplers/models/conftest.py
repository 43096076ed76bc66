"""Fixtures of the model tests: small random checkpoints in the official format."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from samplers.models.adm import AdmOptions
from samplers.models.options import parse_options
from samplers.models.unet import Classifier, UNet

Flags = Mapping[str, object]


@pytest.fixture(scope="session")
def small_flags() -> dict[str, object]:
    """The flags of a network of two levels for 8×8 images that runs in milliseconds."""
    return {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": "1,2",
        "attention_resolutions": "4",
        "num_head_channels": 16,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "learn_sigma": True,
    }


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(flags, name=..., seed=...): writes a random network with these flags and returns the file."""

    def write(flags: Flags, name: str = "network.pt", seed: int = 0) -> Path:
        torch.manual_seed(seed)
        torch.save(UNet(parse_options(AdmOptions, "adm", flags).network(3)).state_dict(), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def save_classifier(tmp_path: Path) -> Callable[..., Path]:
    """save_classifier(flags): the same for the classifier that the flags describe."""

    def write(flags: Flags, name: str = "classifier.pt", seed: int = 0) -> Path:
        torch.manual_seed(seed)
        options = parse_options(AdmOptions, "adm", flags)
        network = Classifier(options.classifier(3), options.image_size)
        torch.nn.init.normal_(network.out[2].positional_embedding)  # type: ignore[arg-type]
        torch.save(network.state_dict(), tmp_path / name)
        return tmp_path / name

    return write
