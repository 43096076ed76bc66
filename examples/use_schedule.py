"""Sample with a schedule that was found, in a program of one's own: here for the folder of own_network.py.

    cd mine && lamtune submit job.yaml
    lamtune export --model discs --dataset discs --nfe 10 --job job.yaml -o best.json
    python ../examples/use_schedule.py         # writes images.png: the same noise with λ = 1 and with what was found

The loop is DDIM as anybody may have written it. The store answers programs too, without the command line.
"""

import json
from pathlib import Path

import torch
from own_network import make
from PIL import Image
from torch import Tensor, nn

from samplers.apply import load_schedule, scaled_network
from storage import open_store


def ddim(network: nn.Module, x: Tensor, steps: list[int]) -> Tensor:
    """Images in -1..1 from noise x, at falling training steps."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for step, following in zip(steps, [*steps[1:], -1], strict=True):
        a, b = kept[step], kept[following] if following >= 0 else torch.tensor(1.0)
        eps = network(x, torch.full((len(x),), step))
        x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        x = (b.sqrt() * x0 + (1 - b).sqrt() * eps).float()
    return x


def main() -> None:
    with open_store() as store:
        best = store.best(model="discs", dataset="discs", nfe=10)
    print(
        f"{best.objective} {best.baseline_distance:.4g} at λ = 1, {best.distance:.4g} at k {best.k}, b {best.b}"
    )
    network = make()
    network.load_state_dict(torch.load("net.pt", weights_only=True))
    steps = [round(one["timestep"]) for one in json.loads(Path("best.json").read_text())["steps"]][::-1]
    noise = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = ddim(network, noise, steps)
        with scaled_network(network, load_schedule("best.json")) as scaled:
            after = ddim(scaled, noise, steps)
    rows = [torch.cat(list(images), 2) for images in (before, after)]
    pixels = ((torch.cat(rows, 1) + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save("images.png")


if __name__ == "__main__":
    main()
