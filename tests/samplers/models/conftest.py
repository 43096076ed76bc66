"""Fixtures of the model tests: small random checkpoints in the official format."""

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samplers.models.adm import AdmOptions
from samplers.models.options import parse_options
from samplers.models.unet import Classifier, UNet

Flags = Mapping[str, object]


class Formula:
    """Weights given by a formula instead of a file."""

    @staticmethod
    def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """2u - 1 of the formula in formula_nets/meta.json: splitmix64 seeded by the name."""
        count = math.prod(shape)
        result = np.empty(count)
        base = np.uint64(((zlib.crc32(name.encode()) << 32) + 0x9E3779B97F4A7C15) % (1 << 64))
        for start in range(0, count, 1 << 18):  # what fits the cache
            z = np.arange(start, min(start + (1 << 18), count), dtype=np.uint64)
            z += base
            shifted = np.empty_like(z)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                np.right_shift(z, np.uint64(shift), out=shifted)
                z ^= shifted
                z *= np.uint64(factor)
            np.right_shift(z, np.uint64(31), out=shifted)
            z ^= shifted
            z >>= np.uint64(11)
            result[start : start + len(z)] = z * (2.0 / (1 << 53)) - 1
        return result.reshape(shape)

    @classmethod
    def weights(cls, network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """The state dict of `network`, whose official names begin with `prefix`."""
        state = {}
        for name, tensor in network.state_dict().items():
            shape = tuple(tensor.shape)
            if name.endswith("resample_filter"):
                state[name] = tensor
                continue
            values = cls.uniform(prefix + name, shape)
            if len(shape) > 1:
                values *= math.sqrt(3 / math.prod(shape[1:]))
            else:
                values *= 16 * math.sqrt(3) if name.endswith("freqs") else 0.1
                if name.endswith("weight"):
                    values += 1
            state[name] = torch.from_numpy(values.astype(np.float32))
        return state


@pytest.fixture(scope="session")
def formula() -> type[Formula]:
    """The weights of formula_nets/meta.json."""
    return Formula


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
