"""The parts of a trial, as `benchmarks.trial` has them, for published networks that are larger than CIFAR-10's.

    python -m benchmarks.shapes [--json]

Random weights in the official formats, with the official flags: a time does not depend on them. The extractor is a
pool of pixels, so the features cost nothing here that Inception's would. On a GPU only.
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks import trial
from benchmarks.common import Found, Part, main, scratch
from samplers.models.adm import AdmOptions
from samplers.models.unet import UNet

NFE = 20
_POOL = 8

# The flags of guided-diffusion's README for its ImageNet models.
_ADM: Mapping[str, Any] = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "diffusion_steps": 1000,
    "learn_sigma": True,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
_ADM_64 = {
    **_ADM,
    "image_size": 64,
    "noise_schedule": "cosine",
    "num_channels": 192,
    "num_head_channels": 64,
    "num_res_blocks": 3,
    "use_new_attention_order": True,
}
_ADM_128 = {**_ADM, "image_size": 128, "noise_schedule": "linear", "num_channels": 256, "num_heads": 4}


class _Pooled(nn.Module):
    """uint8 [N, 3, H, W] → the means of 8×8 fields, float32 [N, 192]."""

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return F.adaptive_avg_pool2d(images.float(), _POOL).flatten(1)


def _adm(flags: Mapping[str, Any]) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        torch.save(UNet(AdmOptions(**flags).network(3)).state_dict(), folder / "network.pt")
        return {"format": "adm", "path": "network.pt", "options": dict(flags)}

    return write


def _latent(folder: Path) -> dict[str, Any]:
    """The U-Net and the decoder of CompVis/ldm-celebahq-256."""
    import diffusers

    torch.manual_seed(0)
    root = folder / "ldm"
    diffusers.UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(224, 448, 672, 896),
        down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3),
        up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"),
        attention_head_dim=32,
    ).save_pretrained(root / "unet")
    diffusers.VQModel(
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        layers_per_block=2,
        num_vq_embeddings=8192,
        vq_embed_dim=3,
    ).save_pretrained(root / "vqvae")
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    scheduler.save_pretrained(root / "scheduler")
    return {"format": "diffusers", "path": "ldm"}


CASES: Mapping[str, tuple[Callable[[Path], dict[str, Any]], int, str]] = {
    "ADM, ImageNet 64": (_adm(_ADM_64), 64, "ddpm"),
    "ADM, ImageNet 128": (_adm(_ADM_128), 128, "ddpm"),
    "LDM, CelebA-HQ 256": (_latent, 256, "ldm_ddim"),
}
"""By name: what writes the network and describes it, the size of its images, and a solver for it."""


def measure(job: Path, images: int) -> Found:
    """`trial.measure` of each, at NFE 20 on the images of one call. Nothing where there is no GPU."""
    return {name: _alone(name) for name in CASES} if torch.cuda.is_available() else {}


def _alone(name: str) -> Found:
    """In a process of its own, as a worker's is: what one leaves in the GPU's memory would be lacking the next."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_measured, name).result()


def _measured(name: str) -> Found:
    write, size, solver = CASES[name]
    with scratch() as folder:
        with (
            warnings.catch_warnings()
        ):  # torch would have torch.export instead, which is no format of extractors
            warnings.simplefilter("ignore")
            probe = torch.zeros(2, 3, size, size, dtype=torch.uint8)
            torch.jit.save(torch.jit.trace(_Pooled(), probe), folder / "pooled.pt")  # type: ignore[no-untyped-call]
        wide = 3 * _POOL**2
        np.savez(folder / "reference.npz", mu=np.full(wide, 127.0), sigma=np.eye(wide))
        described = {
            "model": {"name": "random", **write(folder)},
            "dataset": {"name": "none", "reference": "reference.npz"},
            "features": "pooled.pt",
            "sampling": {"solver": solver, "nfe": NFE},
        }
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(described))
        return trial.measure(path, 1, (NFE,))


def table(found: Found) -> list[str]:
    """Those of `trial`, one after the other."""
    if not found:
        return ["  on a GPU only"]
    return [line for name, one in found.items() for line in (f"{name}:", *trial.table(one))]


PART = Part("larger networks", measure, table)

if __name__ == "__main__":
    main({"shapes": PART}, __doc__)
