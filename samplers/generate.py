"""From a range of image ids to images: binds a network, a solver and a schedule to the noise of those ids.

Image i depends on (network, solver, schedule, seed, i) only: not on the range it is asked for in, the worker, or
the micro-batch. Knows nothing of features, distances or trials.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers import noise
from samplers.errors import NonFiniteError
from samplers.grids import Floats
from samplers.guidance import Gradient
from samplers.models.protocol import Model
from samplers.prediction import Predict, Prediction
from samplers.sampling import DDIM, DDPM, EDM, Diffusers
from samplers.schedule import Schedule

# Elements of x that one network call takes when nobody says: 2,000 images of 3×32×32 on a GPU, where larger
# batches gain nothing; on a processor what its caches hold.
_ELEMENTS = {"cuda": 2000 * 3 * 32 * 32, "cpu": 16_384}
INITIAL_DRAW = 0  # the step whose first evaluation is t takes draw t + 1


@dataclass(frozen=True, slots=True)
class Sampler:
    """Makes images with one network and one solver.

    model: on its device. precision: autocast dtype of the network (float32: none); the state stays float32 or
    float64 as the solver's family has it. micro_batch: images per network call, None: chosen by size.
    """

    model: Model
    sampling: DDPM | DDIM | EDM | Diffusers
    device: torch.device
    seed: int = 0
    precision: torch.dtype = torch.float32
    micro_batch: int | None = None

    @torch.no_grad()
    def images(self, schedule: Schedule, start: int, stop: int) -> Tensor:
        """Images of the ids start … stop − 1 as uint8 [stop − start, C, H, W] on the device.

        Raises NonFiniteError. λ_t = schedule.lambdas[t] divides the predicted noise of evaluation t.
        """
        assert schedule.nfe == self.sampling.nfe, f"{schedule.nfe} λ for {self.sampling.nfe} evaluations"
        ids = torch.arange(start, stop, device=self.device)
        shape, dtype = self.model.shape, self.sampling.state_dtype
        labels = noise.labels(self.seed, ids, self.model.num_classes) if self.model.num_classes else None

        def step_noise(t: int) -> Tensor:
            return noise.normal(self.seed, ids, t + 1, shape, dtype)

        plan = self.sampling.plan(self.model)
        if self.model.prior is None:
            begin = plan.start * noise.normal(self.seed, ids, INITIAL_DRAW, shape, dtype)
        else:
            begin = self.model.prior(self.seed, ids).to(dtype)
        x = plan.run(
            self._network(plan.times, labels),
            schedule,
            begin,
            step_noise,
            self._gradient(plan.times, labels),
        )
        if not torch.isfinite(x).all():  # the only synchronisation: once per range
            raise NonFiniteError("sampling gave images that are not finite")
        return self.model.pixels(x)

    def _network(self, times: Floats, labels: Tensor | None) -> Predict:
        """The network as a function of (x, t), called on micro-batches."""

        def predict(x: Tensor, t: int) -> Prediction:
            parts = [
                self._call(x[s], float(times[t]), None if labels is None else labels[s])
                for s in self._parts(x)
            ]
            v = None if parts[0].v is None else torch.cat([p.v for p in parts if p.v is not None])
            return Prediction(torch.cat([p.eps for p in parts]), v)

        return predict

    def _gradient(self, times: Floats, labels: Tensor | None) -> Gradient | None:
        """The classifier's gradient as a function of (x, t), if the model brings one."""
        gradient = self.model.gradient
        if gradient is None:
            return None
        assert labels is not None
        return lambda x, t: torch.cat([gradient(x[s], float(times[t]), labels[s]) for s in self._parts(x)])

    def _parts(self, x: Tensor) -> list[slice]:
        size = self.micro_batch or max(1, _ELEMENTS[self.device.type] // x[0].numel())
        return [slice(i, i + size) for i in range(0, len(x), size)]

    def _call(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        if self.precision == torch.float32:
            return self.model(x, time, labels)
        with torch.autocast(self.device.type, self.precision):
            return self.model(x, time, labels)
