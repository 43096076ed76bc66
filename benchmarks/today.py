"""A trial of lamtune against the procedure that people use today, on the same network and images in one run.

    python -m benchmarks.today [JOB.yaml] [--images N] [--json]

Today: the network runs eagerly in float32 (TF32 on a GPU that has it), images are written as PNG files, and
torch-fidelity reads the folder back, extracts features (the job's extractor, registered there), and takes the distance
on the processor.
The random numbers are the same on both sides, so both distances are of the same images; they differ by precision.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_input_id_to_statistics, fid_statistics_to_metric

from benchmarks.common import Found, Part, grid, load_case, main, once, seconds
from objectives.features import NetworkExtractor
from samplers.generate import Sampler
from samplers.models.load import load_model
from samplers.rounding import float32
from samplers.schedule import Schedule

_BATCH = 100  # images per call of the sampling and of the extractor: usual values are 50 to 256
_LAYER = "features"


class _Registered(FeatureExtractorBase):  # type: ignore[misc]
    """The job's extractor as torch-fidelity calls it: RGB uint8 [N, 3, H, W] → a tuple of features on the device."""

    def __init__(self, extractor: NetworkExtractor, grey: bool) -> None:
        super().__init__(extractor.name, [_LAYER])
        self._extractor, self._grey = extractor, grey

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (_LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return _LAYER

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self._extractor(images[:, :1] if self._grey else images).double(),)


def measure(job: Path, images: int) -> Found:
    """Seconds of both procedures and of the parts of the older one, and both distances."""
    case = load_case(job)
    evaluator, spec, gpu = case.evaluator, case.spec, case.device.type == "cuda"
    schedule = Schedule.uniform(case.sampling.nfe, 1.0)
    ours: list[float] = []

    found: Found = {"lamtune": seconds(lambda: ours.append(case.trial(images)))}
    plain = load_model(spec.model.format, spec.model.path, spec.model.options, spec.folder).to(case.device)
    sampler = Sampler(plain, case.sampling, case.device, evaluator.seed, torch.float32, _BATCH)
    real = evaluator.reference.gaussian()
    theirs: dict[str, Any] = {}

    def sample(count: int) -> None:
        parts = [sampler.images(schedule, i, min(i + _BATCH, count)) for i in range(0, count, _BATCH)]
        theirs["images"] = torch.cat(parts).permute(0, 2, 3, 1).cpu().numpy()

    with tempfile.TemporaryDirectory() as folder:

        def write() -> None:
            for number, pixels in enumerate(theirs["images"]):
                Image.fromarray(pixels.squeeze()).save(Path(folder, f"{number:06d}.png"))

        def read() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it asks for more readers than a small machine has cores
                theirs["statistics"] = fid_input_id_to_statistics(
                    1,
                    _Registered(evaluator.extractor, evaluator.model.image_shape[0] == 1),
                    _LAYER,
                    input1=folder,
                    batch_size=_BATCH,
                    cuda=gpu,
                    verbose=False,
                    cache=False,
                )

        def distance() -> None:
            other = {"mu": real.mean.cpu().numpy(), "sigma": real.cov.cpu().numpy()}
            theirs["distance"] = fid_statistics_to_metric(theirs["statistics"], other, verbose=False)

        with float32(convolutions="tf32"):
            sample(_BATCH)  # algorithms are chosen in the first call
            found["sampling"] = once(lambda: sample(images))
        found["PNG files"] = once(write)
        found["torch-fidelity: read, features"] = once(read)
        found["torch-fidelity: distance"] = once(distance)
    found["today"] = sum(taken for name, taken in found.items() if name != "lamtune")
    return {
        "seconds": found,
        "ratio": found["today"] / found["lamtune"],
        "distance_lamtune": ours[-1],
        "distance_today": theirs["distance"]["frechet_inception_distance"],
    }


def table(found: Found) -> list[str]:
    """The parts of today's procedure, and the ratio."""
    return [
        *grid([[name, f"{taken:,.2f} s"] for name, taken in found["seconds"].items()]),
        f"  lamtune is {found['ratio']:.1f} times as fast; "
        f"distances {found['distance_lamtune']:.4f} (lamtune), {found['distance_today']:.4f}",
    ]


PART = Part("lamtune against eager sampling, PNG files and torch-fidelity", measure, table)

if __name__ == "__main__":
    main({"today": PART}, __doc__)
