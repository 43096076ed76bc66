"""Train the bundled digits network and its feature extractor: the weights that `lamtune demo` uses.

    python examples/train_digits.py            # about 8 minutes on two cores; needs scikit-learn

Data: the 1,797 grey 8×8 digits that ship with scikit-learn. Writes, into the packages:

    samplers/models/digits.pt          state dict in the ADM naming, half precision (flags: samplers/models/digits.py)
    objectives/digits-features.pt      a small classifier whose pooled layer is the feature space
    objectives/digits-reference.npz    mean and covariance of the features of all digits
    objectives/digits-images.npz       the digits, for what needs images: metrics beside the distance, the diagnosis

The diffusion network is trained like ADM (noise prediction, cosine schedule, 1,000 steps) but for minutes, at a high
learning rate and without the mean of weights over time: its predictions err, as those of larger networks do on
harder data, and that is what epsilon scaling corrects. With the mean of weights, this easy data leaves nothing to
gain. Nothing in the training knows of λ.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from objectives.features import DIGITS, DIGITS_WEIGHTS, DigitsFeatures, load_extractor
from objectives.reference import DIGITS_IMAGES, DIGITS_REFERENCE, Reference, compute_reference
from samplers.grids import training_betas
from samplers.models.adm import AdmOptions
from samplers.models.digits import FLAGS, WEIGHTS
from samplers.models.options import parse_options
from samplers.models.unet import UNet


def digits() -> tuple[Tensor, Tensor]:
    """All digits as uint8 [1797, 1, 8, 8] in 0..255, and their classes."""
    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    return torch.from_numpy(pixels), torch.from_numpy(data.target)


def train_features(pixels: Tensor, classes: Tensor, steps: int) -> DigitsFeatures:
    """A classifier trained on shifted digits, all but every tenth; prints its accuracy on those held out."""
    network = DigitsFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    held_out = torch.arange(len(pixels)) % 10 == 0
    images, labels = pixels[~held_out].float(), classes[~held_out]
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,))
        dx, dy = torch.randint(-1, 2, (2,)).tolist()
        shifted = torch.roll(F.pad(images[chosen], (1, 1, 1, 1)), (dy, dx), (2, 3))[:, :, 1:-1, 1:-1]
        loss = F.cross_entropy(network(shifted), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        right = network(pixels[held_out]).argmax(1) == classes[held_out]
    print(
        f"features: {100 * right.float().mean():.1f} % of {len(right)} held-out digits are classified correctly"
    )
    return network


def statistics(pixels: Tensor) -> Reference:
    """Mean and covariance of the bundled features of all digits."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scikit-learn-digits.npz"
        np.savez(file, arr_0=pixels.permute(0, 2, 3, 1).numpy())
        return compute_reference(file, load_extractor(DIGITS, (1, 8, 8)), (1, 8, 8))


def train_network(pixels: Tensor, steps: int) -> dict[str, Tensor]:
    """The weights of an ADM U-Net after `steps` steps of batch 128."""
    options = parse_options(AdmOptions, "digits", FLAGS)
    network = UNet(options.network(pixels.shape[1]))
    # As in the official code, the last convolution of each residual branch starts at zero.
    for name, parameter in network.named_parameters():
        if "out_layers.3" in name or "proj_out" in name or name.startswith("out.2"):
            torch.nn.init.zeros_(parameter)
    print(f"network: {sum(p.numel() for p in network.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 200)
    abar = torch.from_numpy(np.cumprod(1 - training_betas(options.noise_schedule, options.diffusion_steps)))
    images = pixels.float() / 127.5 - 1
    started, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        x0 = images[torch.randint(len(images), (128,))]
        t = torch.randint(options.diffusion_steps, (128,))
        noise = torch.randn_like(x0)
        signal = abar[t].float()[:, None, None, None]
        predicted = network(signal.sqrt() * x0 + (1 - signal).sqrt() * noise, t.float())
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        total += loss.item()
        if step % 500 == 0:
            left = (time.monotonic() - started) / step * (steps - step)
            print(f"network: step {step}, loss {total / 500:.4f}, {left / 60:.1f} minutes left", flush=True)
            total = 0.0
    return {name: value.half() for name, value in network.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=4000, help="steps of the diffusion network (default 4000)"
    )
    parser.add_argument("--only", choices=["features", "network"], help="train one of the two")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pixels, classes = digits()
    if arguments.only != "network":
        torch.save(train_features(pixels, classes, steps=3000).state_dict(), DIGITS_WEIGHTS)
        statistics(pixels).save(DIGITS_REFERENCE)
        np.savez_compressed(DIGITS_IMAGES, arr_0=pixels.permute(0, 2, 3, 1).numpy())
    if arguments.only != "features":
        torch.save(train_network(pixels, arguments.steps), WEIGHTS)


if __name__ == "__main__":
    main()
