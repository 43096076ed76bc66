"""From a range of image ids to images: binds a network, a solver and a schedule to the noise of those ids.

Image i depends on (network, solver, schedule, seed, i) only: not on the range it is asked for in, or the worker; on the
micro-batch by rounding. Here too: Γ of a network, from images to it. Knows nothing of features, distances or trials.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from samplers import noise
from samplers.analytic import Statistics, estimate_ms_eps
from samplers.compiling import once_per_host
from samplers.errors import NonFiniteError
from samplers.grids import Floats
from samplers.guidance import Gradient
from samplers.models.protocol import Model
from samplers.prediction import Predict, Prediction
from samplers.sampling import Plan, Solver
from samplers.schedule import Schedule

# Elements of x that one network call takes when nobody says: 1,250 images of 3×32×32 on a GPU, which then takes 2 %
# longer for an image than with 2,000, and 500 images would 22 %, while eight GPUs can share 10,000 images evenly; on a
# processor what its caches hold.
_ELEMENTS = {"cuda": 1250 * 3 * 32 * 32, "cpu": 16_384}
_SIZES = (
    1250,
    500,
    250,
    125,
    50,
    25,
    10,
    5,
    2,
    1,
)  # images of one call, which divide most ranges that are asked for
_LAST = 4  # where a step begins, of one evaluation or of two
_SHARE = 0.5  # of the free memory of a GPU that a call may take; features, noise and decoders want some too
Observe = Callable[[int, Tensor, Tensor], None]
"""observe(t, x, eps): the states of a batch that the network saw at evaluation t, and the noise that it predicted,
undivided."""

INITIAL_DRAW = 0  # the step whose first evaluation is t takes draw t + 1


@dataclass(frozen=True, slots=True)
class Sampler:
    """Makes images with one network and one solver.

    model: on its device. precision: autocast dtype of the network (float32: none); the state stays float32 or
    float64 as the solver's family has it. micro_batch: images per network call, None: chosen by size.
    """

    model: Model
    sampling: Solver
    device: torch.device
    seed: int = 0
    precision: torch.dtype = torch.float32
    micro_batch: int | None = None

    @torch.no_grad()
    def images(self, schedule: Schedule, start: int, stop: int, observe: Observe | None = None) -> Tensor:
        """Images of the ids start … stop − 1 as uint8 [stop − start, C, H, W] on the device.

        Raises NonFiniteError. λ_t = schedule.lambdas[t] divides the predicted noise of evaluation t. observe is
        called at each evaluation of each micro-batch. The memory is that of one micro-batch and the images: a batch
        goes from noise to pixels before the next one begins.
        """
        assert schedule.nfe == self.sampling.nfe, f"{schedule.nfe} λ for {self.sampling.nfe} evaluations"
        plan = self.sampling.plan(self.model)
        ids = torch.arange(start, stop, device=self.device)
        finite, made = torch.ones((), dtype=torch.bool, device=self.device), []
        for batch in torch.split(ids, self.size):
            x = self._states(plan, schedule, batch, observe)
            finite &= torch.isfinite(x).all()
            made.append(self.model.pixels(x))
        if not finite:  # the only synchronisation: once per range
            raise NonFiniteError("sampling gave images that are not finite")
        return torch.cat(made)

    def _states(self, plan: Plan, schedule: Schedule, ids: Tensor, observe: Observe | None) -> Tensor:
        """The final states of these images."""
        shape, dtype = self.model.shape, self.sampling.state_dtype
        labels = noise.labels(self.seed, ids, self.model.num_classes) if self.model.num_classes else None
        if self.model.prior is None:
            begin = plan.start * noise.normal(self.seed, ids, INITIAL_DRAW, shape, dtype)
        else:
            begin = self.model.prior(self.seed, ids).to(dtype)
        network = self.network(plan.times, labels)
        return plan.run(
            network if observe is None else observed(network, observe),
            schedule,
            begin,
            lambda t: noise.normal(self.seed, ids, t + 1, shape, dtype),
            self._gradient(plan.times, labels),
        )

    def network(self, times: Floats, labels: Tensor | None) -> Predict:
        """The network as a function of (x, t), called on micro-batches."""

        def predict(x: Tensor, t: int) -> Prediction:
            parts = [
                self._call(x[s], float(times[t]), None if labels is None else labels[s])
                for s in self._parts(x)
            ]
            if len(parts) == 1:
                return parts[0]
            v = None if parts[0].v is None else torch.cat([p.v for p in parts if p.v is not None])
            return Prediction(torch.cat([p.eps for p in parts]), v)

        return predict

    def warm_up(self) -> None:
        """Compile what is to be compiled, so that the first images cost what all others do."""
        if self.device.type != "cuda":
            return
        with once_per_host(self.model.fingerprint, self.size, self.precision):
            self.rehearse()
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def rehearse(self) -> None:
        """Take one micro-batch through the last evaluations, which call all that the others do."""
        plan = self.sampling.plan(self.model)
        if plan.tail is None:  # the library's schedulers and LDM's DDIM compile nothing of their own
            self._one_call(self.size)
            return
        if self.sampling.nfe > _LAST:
            plan = plan.tail(_LAST)
        ids = torch.arange(self.size, device=self.device)
        self.model.pixels(self._states(plan, Schedule.uniform(len(plan.times), 1.0), ids, None))

    @torch.no_grad()
    def fitted(self) -> Self:
        """The same with the largest micro-batch whose call fits into the memory of its GPU, tried out; call it before
        the network is compiled. A micro-batch that was asked for stays."""
        if self.device.type != "cuda" or self.micro_batch is not None:
            return self
        for count in (n for n in _SIZES if n <= self.size):
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            try:
                replace(self, micro_batch=count)._one_call(count)
                taken = torch.cuda.max_memory_allocated(self.device) - before
            except torch.cuda.OutOfMemoryError:
                taken = None
            torch.cuda.empty_cache()
            if taken is not None and taken <= _SHARE * torch.cuda.mem_get_info(self.device)[0]:
                return replace(self, micro_batch=count)
        return replace(self, micro_batch=1)

    def _one_call(self, count: int) -> None:
        """Noise, one evaluation and pixels of `count` images, for what they cost."""
        ids = torch.arange(count, device=self.device)
        x = noise.normal(self.seed, ids, INITIAL_DRAW, self.model.shape, self.sampling.state_dtype)
        labels = torch.zeros_like(ids) if self.model.num_classes else None
        answer = self.network(self.sampling.plan(self.model).times, labels)(x, 0)
        self.model.pixels(answer.eps)

    def _gradient(self, times: Floats, labels: Tensor | None) -> Gradient | None:
        """The classifier's gradient as a function of (x, t), if the model brings one."""
        gradient = self.model.gradient
        if gradient is None:
            return None
        assert labels is not None
        return lambda x, t: torch.cat([gradient(x[s], float(times[t]), labels[s]) for s in self._parts(x)])

    def _parts(self, x: Tensor) -> list[slice]:
        return [slice(i, i + self.size) for i in range(0, len(x), self.size)]

    @property
    def size(self) -> int:
        """Images per network call."""
        return self.micro_batch or _micro_batch(self.model, self.device)

    def _call(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        """The answer for one micro-batch at most."""
        count = len(x)
        if lacking := -count % grain(self.size, self.device):
            x = torch.cat([x, x.new_zeros(lacking, *x.shape[1:])])
            labels = None if labels is None else torch.cat([labels, labels.new_zeros(lacking)])
        if self.precision == torch.float32:
            answer = self.model(x, time, labels)
        else:
            with torch.autocast(self.device.type, self.precision):
                answer = self.model(x, time, labels)
        return Prediction(answer.eps[:count], None if answer.v is None else answer.v[:count])


def grain(size: int, device: torch.device) -> int:
    """The images up to which a network call of at most `size` is filled: with fewer it would take as long.

    On a GPU kernels are chosen, and compiled, for a shape: with one shape for all calls an image has the same bits in
    every range.
    """
    return size if device.type == "cuda" else 1


def observed(predict: Predict, observe: Observe) -> Predict:
    """The same prediction, and `observe` sees each."""

    def predict_observed(x: Tensor, t: int) -> Prediction:
        answer = predict(x, t)
        observe(t, x, answer.eps)
        return answer

    return predict_observed


def measure_ms_eps(
    model: Model,
    images: Iterable[Tensor],
    device: torch.device,
    *,
    count: int,
    shift1: bool,
    seed: int = 0,
    micro_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Γ of a discrete-time network without classes, in float32; see `analytic.estimate_ms_eps`.

    model: on `device`. images: `count` in all, in batches of uint8 [B, *model.shape] on any device. shift1: see
    `analytic.AnalyticGrid.times`. micro_batch: see `Sampler`. progress(done, total): evaluations of one image each.

    Raises NonFiniteError.
    """
    assert model.betas is not None, "a discrete-time network"
    assert model.num_classes is None, "a network without classes"
    size = micro_batch or _micro_batch(model, device)

    def batches() -> Iterator[Tensor]:
        for batch in images:
            for part in torch.split(batch, size):
                yield part.to(device).float() / 127.5 - 1

    def predict(x: Tensor, n: int) -> Tensor:
        return model(x, float(n - int(shift1)), None).eps

    return estimate_ms_eps(predict, batches(), model.betas, seed=seed, count=count, progress=progress)


def _micro_batch(model: Model, device: torch.device) -> int:
    most = _ELEMENTS[device.type] // math.prod(model.shape)
    return next((n for n in _SIZES if n <= most), 1)
