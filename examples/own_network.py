"""A network and images of one's own, from nothing: all that a search needs, in one folder.

    python examples/own_network.py mine        # about two minutes on two cores
    cd mine && lamtune submit job.yaml

Writes into the folder: images/, 600 pictures of coloured discs, 16×16; net.pt, the weights of a small network of this
very file, which is copied there as net.py; features.pt, a TorchScript feature extractor; job.yaml.

The discs, the network and the extractor stand for yours. `make` is what the job file names; the rest is training.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIDE = 16
JOB = """\
model:
  name: discs
  format: python
  path: net.py:make
  options: {shape: [3, 16, 16], time: discrete, prediction: epsilon, noise_schedule: linear, weights: net.pt}
dataset:  {name: discs, reference: images}
features: features.pt
sampling: {solver: ddim, nfe: 10}
search:   {images: 1000, seed: 0}
"""


class Network(nn.Module):
    """Predicts the noise in x [B, 3, 16, 16] at the training steps t [B], 0 to 999: a U-Net of three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Embedding(1000, 32 + 64 + 128)
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.ModuleList(
            [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.Conv2d(64, 128, 3, stride=2, padding=1)]
        )
        self.middle = nn.Sequential(
            nn.SiLU(), nn.Flatten(), nn.Linear(2048, 2048), nn.Unflatten(1, (128, 4, 4))
        )
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
                nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            ]
        )
        self.last = nn.Sequential(nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        at = [part[:, :, None, None] for part in self.steps(t.long()).split((32, 64, 128), 1)]
        large = self.first(x) + at[0]
        half = self.down[0](nn.functional.silu(large)) + at[1]
        small = self.down[1](nn.functional.silu(half)) + at[2]
        half = half + self.up[0](nn.functional.silu(small + self.middle(small)))
        return self.last(large + self.up[1](nn.functional.silu(half)))


def make() -> nn.Module:
    """The network, into which lamtune loads `weights`."""
    return Network()


def discs(count: int, numbers: np.random.Generator) -> np.ndarray:
    """uint8 [count, 16, 16, 3]: a disc of any colour, place and size on a grey ground."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centre, radius = numbers.uniform(5, 11, (count, 2)), numbers.uniform(2, 5, count)
    away = np.hypot(rows - centre[:, 0, None, None], columns - centre[:, 1, None, None])
    inside = np.clip(radius[:, None, None] + 0.5 - away, 0, 1)[..., None]
    colours = numbers.uniform(0, 255, (count, 1, 1, 3))
    return np.round(128 + inside * (colours - 128)).astype(np.uint8)


def train(pixels: np.ndarray, steps: int) -> Network:
    """Noise prediction with the linear schedule of DDPM."""
    network, images = Network(), torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for _ in range(steps):
        x0, t = images[torch.randint(len(images), (64,))], torch.randint(1000, (64,))
        eps, share = torch.randn_like(x0), kept[t][:, None, None, None]
        loss = (network(share.sqrt() * x0 + (1 - share).sqrt() * eps, t) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


class Features(nn.Module):
    """uint8 [N, 3, 16, 16] → [N, 48]: means and spreads over the image of what random filters see."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, 24, 5)

    def forward(self, images: Tensor) -> Tensor:
        seen = torch.relu(self.filters(images.float() / 127.5 - 1)).flatten(2)
        return torch.cat([seen.mean(2), seen.std(2)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200, help="of the training")
    given = parser.parse_args()
    torch.manual_seed(0)
    pixels = discs(600, np.random.default_rng(0))
    (given.folder / "images").mkdir(parents=True)
    for place, image in enumerate(pixels):
        Image.fromarray(image).save(given.folder / "images" / f"{place:03}.png")
    torch.save(train(pixels, given.steps).state_dict(), given.folder / "net.pt")
    torch.jit.script(Features().eval()).save(given.folder / "features.pt")
    shutil.copy(__file__, given.folder / "net.py")
    (given.folder / "job.yaml").write_text(JOB)


if __name__ == "__main__":
    main()
