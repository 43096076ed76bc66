"""A job's `sampling`, bound to networks: what is scaled, where it starts, which times are visited, what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import analytic, ldm
from samplers.errors import InputError
from samplers.generate import Sampler, measure_ms_eps
from samplers.grids import Churn, sigma_grid, training_betas
from samplers.models.edm import EdmModel, load_edm, load_pfgmpp
from samplers.models.ideal import IdealModel, PointCloud
from samplers.models.process import Process
from samplers.prediction import Prediction
from samplers.sampling import DDIM, DDPM, EDM, LDM, SOLVERS, AnalyticDDIM, AnalyticDDPM, Solver
from samplers.schedule import Schedule
from samplers.solvers import Variance, edm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cloud() -> IdealModel:
    """Twenty points, denoised exactly."""
    points = np.random.default_rng(0).uniform(-1, 1, (20, 3, 4, 4))
    return IdealModel(PointCloud(points), Process(sigma_range=(0.002, 80.0)))


def sampled(model: Any, sampling: Solver, schedule: Schedule) -> Tensor:
    """Four images of fixed noise."""
    plan = sampling.plan(model)
    numbers = torch.Generator().manual_seed(0)
    x = plan.start * torch.randn(4, *model.shape, generator=numbers, dtype=torch.float64)

    def noise(t: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1 + t), dtype=torch.float64)

    return plan.run(lambda x, t: model(x, float(plan.times[t]), None), schedule, x, noise, None)


def official(model: Any, sampling: EDM, schedule: Schedule, *, ablation: bool) -> Tensor:
    """The same with the division by λ written into the loop, as EDM-ES has it: D becomes x - (x - D)/λ."""
    churn = Churn(sampling.S_churn, sampling.S_min, float("inf"), sampling.S_noise)
    grid = sigma_grid(
        sampling.nfe,
        method=sampling.solver,
        discretization=sampling.discretization,
        schedule=sampling.schedule,
        scaling=sampling.scaling,
        churn=churn,
        limits=model.sigma_range,
    )

    def predict(x: Tensor, t: int) -> Prediction:
        sigma, s = float(grid.times[t]), float(grid.scale[t])
        image = x / s - sigma * model(x / s, sigma, None).eps
        lam = schedule.lambdas[t]
        if not ablation:
            image = x / s - (x / s - image) / lam
        elif sampling.solver == "euler" or t % 2 == 0:
            image = x - (x - image) / lam
        return Prediction((x - image) / sigma)

    numbers = torch.Generator().manual_seed(0)
    x = grid.start * torch.randn(4, *model.shape, generator=numbers, dtype=torch.float64)

    def noise(t: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1 + t), dtype=torch.float64)

    return edm(predict, x, grid, noise)


@pytest.mark.parametrize("rule", ["paper", "edm-es-ablation"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"discretization": "vp", "schedule": "vp", "scaling": "vp"},
        {"discretization": "ve", "schedule": "ve"},
        {"S_churn": 20.0, "S_noise": 1.007},
    ],
)
def test_scaling_the_network_equals_scaling_inside_the_loop(
    cloud: IdealModel, rule: Any, solver: Any, settings: dict[str, Any]
) -> None:
    sampling = EDM(solver=solver, nfe=9, rule=rule, **settings)
    schedule = Schedule.linear(9, 0.002, 0.99)
    out = sampled(cloud, sampling, schedule)
    inside = official(cloud, sampling, schedule, ablation=rule != "paper")
    # the last digits; steps of the ve schedule are so long that Heun leaves the range of the data
    torch.testing.assert_close(out, inside, rtol=0, atol=1e-12 * max(10, float(inside.abs().max())))


def test_the_rules_differ_in_heun_s_corrections_and_in_the_scaled_state(cloud: IdealModel) -> None:
    schedule = Schedule.uniform(9, 1.01)
    vp: dict[str, Any] = {"discretization": "vp", "schedule": "vp", "scaling": "vp"}
    for solver, settings, same in (("euler", {}, True), ("heun", {}, False), ("euler", vp, False)):
        paper = EDM(solver=solver, nfe=9, **settings)
        difference = (
            sampled(cloud, paper, schedule) - sampled(cloud, replace(paper, rule="edm-es-ablation"), schedule)
        ).abs()
        assert (float(difference.max()) == 0) == same, (solver, settings)


def test_without_scaling_the_rules_are_one(cloud: IdealModel) -> None:
    one = Schedule.uniform(9, 1.0)
    paper = EDM(solver="heun", nfe=9, scaling="vp", schedule="vp", discretization="vp")
    ablation = replace(paper, rule="edm-es-ablation")
    torch.testing.assert_close(sampled(cloud, paper, one), sampled(cloud, ablation, one), rtol=0, atol=0)


def test_a_network_of_few_levels_is_only_asked_at_those(
    save_snapshot: Callable[..., Path], nvidia: Any
) -> None:
    levels = torch.cat([torch.linspace(90, 0.01, 1000), torch.zeros(1)])
    file = save_snapshot("iDDPMPrecond", buffers={"u": nvidia.tensor(levels)})
    times = EDM(solver="heun", nfe=9).plan(load_edm(file, {})).times
    assert set(times) <= set(levels.double().tolist())
    assert times[-1] == pytest.approx(80, abs=0.1)


class Told:
    """A model that remembers the states it was shown."""

    def __init__(self, model: EdmModel) -> None:
        self.model, self.states = model, list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        self.states.append(x)
        return self.model(x, time, labels)


def test_sampling_starts_at_the_prior_where_there_is_one(save_snapshot: Callable[..., Path]) -> None:
    file = save_snapshot(attributes={"pfgmpp": True, "D": 128, "N": 192})
    model: Any = Told(load_pfgmpp(file, {}))
    sampler = Sampler(model, EDM(solver="heun", nfe=3), CPU, seed=3)
    images = sampler.images(Schedule.uniform(3, 1.0), 5, 9)
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(model.states[0], model.prior(3, torch.arange(5, 9)), rtol=0, atol=0)
    alone = [sampler.images(Schedule.uniform(3, 1.0), i, i + 1) for i in range(5, 9)]
    assert (torch.cat(alone).int() - images.int()).abs().max() <= 1  # float32 rounding at a pixel's edge


def test_a_prior_goes_with_no_scaling_of_the_state(save_snapshot: Callable[..., Path]) -> None:
    model = load_pfgmpp(save_snapshot(attributes={"pfgmpp": True, "D": 128, "N": 192}), {})
    with pytest.raises(InputError, match=r"sampling\.scaling: this network starts from a prior of its own"):
        EDM(solver="heun", nfe=3, scaling="vp").plan(model)


def test_elsewhere_sampling_starts_at_the_first_level_times_the_latents(cloud: IdealModel) -> None:
    assert EDM(solver="heun", nfe=3).plan(cloud).start == pytest.approx(80)
    scaled = EDM(solver="euler", nfe=3, scaling="vp", sigma_max=3.0).plan(cloud)
    assert scaled.start == pytest.approx(3 / 10**0.5)


# --- ADM ----------------------------------------------------------------------------------------------------

STEPS = 40


@pytest.fixture(scope="module")
def discrete() -> IdealModel:
    """Twenty points, denoised exactly, of a discrete-time process."""
    points = np.random.default_rng(0).uniform(-1, 1, (20, 3, 4, 4))
    return IdealModel(PointCloud(points), Process(betas=training_betas("cosine", STEPS)))


class Loop:
    """guided-diffusion's loops with ADM-ES's division by λ, written out for one model and one list of timesteps."""

    def __init__(self, model: Any, timesteps: list[int], lambdas: Sequence[float], *, guide: bool) -> None:
        abar = np.cumprod(1 - model.betas)[timesteps]
        self.abar, self.before = abar, np.append(1.0, abar[:-1])
        self.beta = 1 - abar / self.before
        self.small = self.beta * (1 - self.before) / (1 - abar)
        self.model, self.timesteps, self.lambdas, self.guide = model, timesteps, lambdas, guide

    def image(self, x: Tensor, eps: Tensor, t: int, *, clip: bool) -> Tensor:
        """x0 of the noise that is divided on the way."""
        eps = eps / self.lambdas[t]
        x0 = x / self.abar[t] ** 0.5 - (1 / self.abar[t] - 1) ** 0.5 * eps
        return x0.clamp(-1, 1) if clip else x0

    def ddpm(self, x: Tensor, noise: Any, variance: str, clip: bool) -> Tensor:
        for t in reversed(range(len(self.timesteps))):
            eps, v = self.model(x, self.timesteps[t], None)
            x0 = self.image(x, eps, t, clip=clip)
            weight = self.beta[t] * self.before[t] ** 0.5 / (1 - self.abar[t])
            kept = (1 - self.before[t]) * (1 - self.beta[t]) ** 0.5 / (1 - self.abar[t])
            small = torch.tensor(self.small[t])
            log_small = torch.tensor(self.small[max(t, 1)]).log()
            if variance == "fixed_small":
                var, log_var = small, log_small
            elif variance == "fixed_large":
                log_var = torch.tensor(self.beta[t]).log() if t else log_small
                var = log_var.exp()
            else:
                part = (v + 1) / 2
                log_var = part * torch.tensor(self.beta[t]).log() + (1 - part) * log_small
                var = log_var.exp()
            mean = weight * x0 + kept * x
            if self.guide:
                mean = mean + var * slope(x, t)
            x = mean + (0.5 * log_var).exp() * noise(t) if t else mean
        return x

    def ddim(self, x: Tensor, noise: Any, eta: float, clip: bool) -> Tensor:
        for t in reversed(range(len(self.timesteps))):
            x0 = self.image(x, self.model(x, self.timesteps[t], None).eps, t, clip=clip)
            if self.guide:
                eps = self.implied(x, x0, t) - (1 - self.abar[t]) ** 0.5 * slope(x, t)
                x0 = self.image(x, eps, t, clip=False)  # divided once more
            spread = (1 - self.before[t]) / (1 - self.abar[t]) * (1 - self.abar[t] / self.before[t])
            sigma = eta * spread**0.5
            kept = (1 - self.before[t] - sigma**2) ** 0.5 if t else 0.0
            x = self.before[t] ** 0.5 * x0 + kept * self.implied(x, x0, t) + sigma * noise(t)
        return x

    def implied(self, x: Tensor, x0: Tensor, t: int) -> Tensor:
        return (x / self.abar[t] ** 0.5 - x0) / (1 / self.abar[t] - 1) ** 0.5


def slope(x: Tensor, t: int) -> Tensor:
    """A classifier's gradient."""
    return (0.3 + 0.1 * t) * (0.5 - x)


class Ranged:
    """A model that learned the range of its variance, beyond -1 .. 1 too."""

    variance, learned_range = "learned_range", True

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        return Prediction(self._model(x, time, labels).eps, 1.3 * torch.sin(2 * x + time))


SPACINGS = {"8": [0, 6, 11, 17, 22, 28, 33, 39], "5,3,2": [0, 3, 6, 10, 13, 14, 20, 26, 27, 39]}


@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_adm_s_samplers_equal_the_official_loops_with_scaling_written_into_them(
    discrete: IdealModel, spacing: str, clip: bool, guide: bool
) -> None:
    model = Ranged(discrete)
    timesteps = SPACINGS[spacing]
    schedule = Schedule.linear(len(timesteps), 0.003, 0.99)
    loop = Loop(model, timesteps, schedule.lambdas, guide=guide)
    x, noise = start_and_noise(discrete)
    gradient = slope if guide else None

    def out(sampling: DDPM | DDIM) -> Tensor:
        plan = sampling.plan(model)
        assert plan.times.tolist() == timesteps
        return plan.run(lambda x, t: model(x, float(plan.times[t]), None), schedule, x, noise, gradient)

    variances: tuple[Variance, ...] = ("fixed_small", "fixed_large", "learned_range")
    for variance in variances:
        ddpm = DDPM("ddpm", len(timesteps), respacing=spacing, variance=variance, clip=clip)
        close(out(ddpm), loop.ddpm(x, noise, variance, clip))
    for eta in (0.0, 0.4, 1.0):
        ddim = DDIM("ddim", len(timesteps), respacing=spacing, eta=eta, clip=clip)
        close(out(ddim), loop.ddim(x, noise, eta, clip))


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal to the last digits of the largest number."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * max(1.0, float(wanted.abs().max())))


# --- Analytic-DPM and LDM -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ms_eps(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of plausible Γ."""
    file = tmp_path_factory.mktemp("statistics") / "ms_eps.npz"
    source = analytic.MsEpsSource("m", "d", 1, 0, True)
    analytic.save_ms_eps(file, np.linspace(0.3, 1, STEPS + 1, dtype=np.float32), source)
    return str(file)


class Altered:
    """A model with some of its properties changed."""

    def __init__(self, model: Any, **changes: Any) -> None:
        self._model = model
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        out: Prediction = self._model(x, time, labels)
        return out


def test_the_names_of_all_solvers_are_known() -> None:
    known = ("ddpm", "ddim", "euler", "heun", "analytic_ddpm", "analytic_ddim", "ldm_ddim")
    assert set(known) <= set(SOLVERS)


def scaled_inside(model: Any, plan_times: Any, schedule: Schedule) -> Any:
    """The network whose output is divided by λ right where the official loops read it."""

    def predict(x: Tensor, t: int) -> Prediction:
        return Prediction(model(x, float(plan_times[t]), None).eps / schedule.lambdas[t])

    return predict


def start_and_noise(model: Any) -> tuple[Tensor, Any]:
    """What `sampled` gives the solvers."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(4, *model.shape, generator=numbers, dtype=torch.float64)

    def noise(t: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1 + t), dtype=torch.float64)

    return x, noise


def test_analytic_sampling_scales_the_noise_and_leaves_the_statistics_alone(
    discrete: IdealModel, ms_eps: str
) -> None:
    schedule = Schedule.linear(7, 0.003, 0.99)
    assert discrete.betas is not None
    grid = analytic.analytic_grid(discrete.betas, 7, shift1=True)
    gamma = analytic.read_ms_eps(Path(ms_eps), STEPS)
    x, noise = start_and_noise(discrete)
    net = scaled_inside(discrete, grid.times, schedule)
    variance = analytic.clipped(
        analytic.ddpm_variance(grid, "analytic", gamma), grid, clip_sigma_idx=1, clip_pixel=2
    )
    out = sampled(discrete, AnalyticDDPM("analytic_ddpm", 7, clip_sigma_idx=1, ms_eps=ms_eps), schedule)
    inside = analytic.ddpm(net, x, grid, noise, variance=variance)
    torch.testing.assert_close(out, inside, rtol=0, atol=0)

    out = sampled(discrete, AnalyticDDIM("analytic_ddim", 7, eta=0.5, ms_eps=ms_eps), schedule)
    variance = analytic.ddim_variance(grid, 0.5, gamma)
    inside = analytic.ddim(net, x, grid, noise, variance=variance, eta=0.5)
    torch.testing.assert_close(out, inside, rtol=0, atol=0)


def test_variances_that_need_no_statistics_do_not_ask_for_them(discrete: IdealModel, ms_eps: str) -> None:
    assert AnalyticDDPM("analytic_ddpm", 7).lacks_ms_eps
    assert not AnalyticDDPM("analytic_ddpm", 7).with_ms_eps(Path(ms_eps)).lacks_ms_eps
    fixed = AnalyticDDPM("analytic_ddpm", 7, variance="fixed_large", clip=False)
    ddim = AnalyticDDIM("analytic_ddim", 7, variance="ddim")
    for sampling in (fixed, ddim):
        assert not sampling.lacks_ms_eps
        assert torch.isfinite(sampled(discrete, sampling, Schedule.uniform(7, 1.0))).all()


def test_ldm_scales_the_noise_and_may_make_more_evaluations_than_steps(discrete: IdealModel) -> None:
    schedule = Schedule.linear(7, 0.003, 0.99)
    assert discrete.betas is not None
    grid = ldm.latent_grid(discrete.betas, 6)
    x, noise = start_and_noise(discrete)
    inside = ldm.ddim(scaled_inside(discrete, grid.times, schedule), x, grid, noise, eta=0.5, temperature=0.9)
    sampling = LDM("ldm_ddim", 7, eta=0.5, temperature=0.9, ddim_steps=6)
    assert sampling.plan(discrete).times.tolist() == grid.times.tolist() == [1, 7, 13, 19, 25, 31, 37]
    torch.testing.assert_close(sampled(discrete, sampling, schedule), inside, rtol=0, atol=0)
    latents = Altered(discrete, image_shape=(3, 32, 32))
    torch.testing.assert_close(sampled(latents, sampling, schedule), inside, rtol=0, atol=0)


def test_what_does_not_fit_the_network_is_refused_with_its_key(
    cloud: IdealModel, discrete: IdealModel, ms_eps: str, tmp_path: Path
) -> None:
    guided = Altered(discrete, gradient=lambda x, time, labels: x)
    latent = Altered(discrete, image_shape=(3, 32, 32))
    ddpm, ddim = AnalyticDDPM("analytic_ddpm", 7), AnalyticDDIM("analytic_ddim", 7)
    absent = str(tmp_path / "absent.ms_eps.pth")
    cases: list[tuple[Any, Any, str]] = [
        (ddpm, cloud, r"sampling\.solver: analytic_ddpm needs a discrete-time network"),
        (LDM("ldm_ddim", 5), cloud, r"sampling\.solver: ldm_ddim needs a discrete-time network"),
        (DDIM("ddim", 5), cloud, r"sampling\.solver: ddim needs a discrete-time network"),
        (ddim, guided, r"sampling\.solver: analytic_ddim takes no guidance by a classifier"),
        (LDM("ldm_ddim", 5), guided, r"sampling\.solver: ldm_ddim takes no guidance by a classifier"),
        (ddpm, latent, r"sampling\.solver: analytic_ddpm clamps .* use ldm_ddim"),
        (replace(ddpm, nfe=STEPS + 1), discrete, r"sampling\.nfe: Analytic-DPM takes 2 to 40 steps"),
        (replace(ddpm, clip_sigma_idx=7), discrete, r"sampling\.clip_sigma_idx must lie within 0 \.\. 6"),
        (replace(ddim, ms_eps=absent), discrete, r"sampling\.ms_eps: .*absent\.ms_eps\.pth cannot be read"),
        (
            LDM("ldm_ddim", 6),
            discrete,
            r"sampling\.nfe: LDM makes 7 evaluations .* for 6 steps; write nfe: 7 and ddim_steps: 6",
        ),
        (LDM("ldm_ddim", 9, ddim_steps=3), discrete, r"sampling\.ddim_steps: "),
    ]
    for sampling, model, message in cases:
        with pytest.raises(InputError, match=message):
            sampling.plan(model)
    with pytest.raises(InputError, match="clip: false needs"):
        AnalyticDDPM("analytic_ddpm", 7, clip=False)
    with pytest.raises(InputError, match="clip_sigma_idx needs"):
        AnalyticDDIM("analytic_ddim", 7, variance="ddim", clip_sigma_idx=1)


@pytest.mark.parametrize(
    ("sampling", "changes", "message"),
    [
        (DDIM("ddim", 5), {"eta": 1.5}, "eta must lie between 0"),
        (AnalyticDDIM("analytic_ddim", 5), {"eta": float("nan")}, "eta must lie between 0"),
        (LDM("ldm_ddim", 5), {"eta": -0.1}, "eta must lie between 0"),
        (LDM("ldm_ddim", 5), {"temperature": float("inf")}, "temperature must be finite"),
        (EDM("heun", 5), {"S_churn": -1.0}, "S_churn must be finite"),
        (EDM("heun", 5), {"S_noise": float("nan")}, "S_noise must be finite"),
        (EDM("heun", 5, S_max=1.0), {"S_min": 2.0}, "S_min and S_max must satisfy"),
        (EDM("heun", 5), {"S_max": -1.0}, "S_min and S_max must satisfy"),
    ],
)
def test_a_parameter_out_of_range_is_refused_also_where_it_replaces_another(
    sampling: Any, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        replace(sampling, **changes)


class Zero:
    """A network of 30 timesteps that takes every image for 0, and remembers the times it was told."""

    betas = training_betas("linear", 30)
    shape = image_shape = (1, 16, 16)
    num_classes = None

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        abar = np.cumprod(1 - self.betas)[len(self.times) % 30]
        self.times.append(time)
        return Prediction(x / float(np.sqrt(1 - abar)))


def test_measured_statistics_are_those_of_the_pixels_whatever_the_batches() -> None:
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (9, 1, 16, 16), generator=numbers, dtype=torch.uint8)

    def measured(shift1: bool) -> tuple[Any, list[float]]:
        model: Any = Zero()
        return measure_ms_eps(model, [pixels[:4], pixels[4:]], CPU, count=9, shift1=shift1), model.times

    whole, times = measured(shift1=True)
    assert times == [*range(30), *range(30)]
    # What it says is x/sqrt(1 - abar): the noise, and what is left of the image.
    abar = np.cumprod(1 - Zero.betas)
    power = float((pixels.double() / 127.5 - 1).square().mean())
    np.testing.assert_allclose(whole[1:], abar / (1 - abar) * power + 1, rtol=0.15)
    assert whole[1] == pytest.approx(abar[0] / (1 - abar[0]) * power + 1, rel=0.02)  # nearly all of the image
    np.testing.assert_array_equal(measured(shift1=False)[0], whole)
    assert measured(shift1=False)[1] == [*range(1, 31), *range(1, 31)]
    with pytest.raises(InputError, match="are 9"):
        measure_ms_eps(Zero(), [pixels], CPU, count=10, shift1=True)  # type: ignore[arg-type]


def test_statistics_do_not_depend_on_how_many_images_the_network_gets_at_once(discrete: IdealModel) -> None:
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (9, 3, 4, 4), generator=numbers, dtype=torch.uint8)
    seen: list[tuple[int, int]] = []
    whole, single = (
        measure_ms_eps(
            discrete,
            [pixels[:4], pixels[4:]],
            CPU,
            count=9,
            shift1=True,
            micro_batch=size,
            progress=lambda done, total: seen.append((done, total)),
        )
        for size in (None, 1)
    )
    np.testing.assert_allclose(single, whole, rtol=1e-6)
    assert seen[-1] == (9 * STEPS, 9 * STEPS)
