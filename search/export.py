"""Writes the best schedule in the form in which other programs take it.

Knows the conventions of those programs (what they divide, when, and by which number) and the store's `Best`, and
nothing of networks. A program that cannot express the schedule is said so, with the next step; nothing is rounded.
Imports neither torch nor numpy: asking the store is quick.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from samplers.errors import InputError
from samplers.schedule import Schedule
from search.report import number
from storage import Best

if TYPE_CHECKING:
    from search.spec import JobSpec

# ComfyUI's node "Epsilon Scaling": the range of its field, and the step to which the editor rounds what is typed.
_COMFYUI_RANGE, _COMFYUI_STEP = (0.5, 1.5), 0.001

_USE_JSON = "use --format json, and samplers.apply in Python"


def export(best: Best, form: str, times: Sequence[float] | None = None) -> str:
    """The text of `best` in one of FORMATS.

    times[t]: the timestep or sigma that the network is told at evaluation t, where known; only "json" has them.
    Raises InputError where the format cannot express the schedule, or its program has not the solver.
    """
    best = replace(best, sampling={**best.sampling, **best.parameters})
    if form == "json":
        return _json(best, times)
    if times is not None:
        raise InputError(f"--job: only --format json writes timesteps or sigmas, not {form}")
    return FORMATS[form](best)


def schedule(best: Best) -> Schedule:
    """What divides the network's noise at each evaluation.

    That is the schedule itself, but for `rule: edm-es-ablation`, which leaves Heun's corrections unscaled. Raises
    InputError where that rule divides something else than the network's noise (scaling vp).
    """
    found = Schedule(best.lambdas, best.k, best.b)
    if best.sampling.get("rule") != "edm-es-ablation" or set(best.lambdas) == {1.0}:
        return found
    if best.sampling.get("scaling") == "vp":
        raise InputError(
            "with rule edm-es-ablation and scaling vp, λ divides no noise of the network: only --format edm-es has it"
        )
    return found.first_stages() if best.solver == "heun" else found


def network_times(spec: "JobSpec", best: Best) -> list[float]:
    """The timestep or sigma of each evaluation, index 0 the last one, from the network that a job file describes.

    Loads the network, and torch with it. Raises InputError where the job's network or sampling is not that of `best`.
    """
    from dataclasses import asdict

    from samplers.models.load import load_model

    model = load_model(spec.model.format, spec.model.path, spec.model.options, spec.folder)
    if model.fingerprint != best.model_fingerprint:
        raise InputError(
            f"--job: its network is not that of the schedule (fingerprint {model.fingerprint[:12]}…, "
            f"not {best.model_fingerprint[:12]}…)"
        )
    for sampling in spec.sampling:
        options = asdict(sampling)
        options.pop("ms_eps", None)  # where a file lies moves no timestep
        if all(best.sampling.get(key) == value for key, value in options.items()):
            times: list[float] = sampling.plan(model).times.tolist()
            return times
    raise InputError(
        f"--job: none of its samplings is that of the schedule, {best.solver} with NFE {best.nfe} and the same options"
    )


def _json(best: Best, times: Sequence[float] | None = None) -> str:
    """`lambdas`, `k` and `b` for `samplers.apply.load_schedule`, `steps` for people, and where they come from."""
    found = schedule(best)
    key = "sigma" if best.solver in ("euler", "heun") else "timestep"
    steps: list[dict[str, Any]] = [{"t": t, "lambda": value} for t, value in enumerate(found.lambdas)]
    for t, time in enumerate(times or ()):
        steps[t][key] = time
    content = {
        "model": best.model,
        "dataset": best.dataset,
        "solver": best.solver,
        "sampling": dict(best.sampling),
        "nfe": best.nfe,
        "k": found.k,
        "b": found.b,
        "lambdas": found.lambdas,
        "steps": steps,  # t = 0 is the last evaluation
        "objective": best.objective,
        "distance": best.distance,
        "baseline_distance": best.baseline_distance,
        "images": best.images,
        "seed": best.seed,
        "evaluator": best.evaluator,
        "model_fingerprint": best.model_fingerprint,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


# --- ADM-ES -------------------------------------------------------------------------------------------------


def _adm_es(best: Best) -> str:
    """Arguments of ADM-ES's image_sample.py and classifier_sample.py, and a patch where λ is not uniform.

    `--eps_scaler` is one λ for all evaluations. Its code has a line with 1.011 hard-coded as the mean of a linear
    schedule, commented out, and after it one that makes the list uniform whatever stood before, so un-commenting
    alone makes λ = k.
    """
    if best.solver not in ("ddpm", "ddim"):
        raise InputError(f"ADM-ES has no {best.solver}, only ddpm and ddim; {_USE_JSON}")
    sampling = best.sampling
    ddim = best.solver == "ddim"
    flags: dict[str, Any] = {
        "timestep_respacing": sampling.get("respacing") or (f"ddim{best.nfe}" if ddim else str(best.nfe)),
        "use_ddim": ddim,
        "clip_denoised": bool(sampling.get("clip", True)),
    }
    if sampling.get("eta"):
        raise InputError(
            f"ADM-ES samples DDIM with eta 0, and this search had {sampling['eta']}; {_USE_JSON}"
        )
    notes = []
    if sampling.get("variance"):
        notes.append(
            f"# The search took the variance {sampling['variance']}: give the model's flags that make it so "
            "(learn_sigma; sigma_small is an argument of create_gaussian_diffusion only)."
        )
    if uniform := _uniform(best):
        flags["eps_scaler"] = uniform
    elif best.k is not None and best.b is not None:
        mean = round(best.b + best.k * (best.nfe - 1) / 2, 12)
        flags["eps_scaler"] = best.k
        notes += [
            "# In guided_diffusion/gaussian_diffusion.py, where GaussianDiffusion sets sampling_scaler:",
            f"#   1. the mean 1.011 becomes {mean!r}",
            "#   2. what is commented out there, the list of start + i * stride, is un-commented",
            "#   3. the line after it, which makes the list uniform, is deleted (else λ would be k)",
        ]
    else:
        flags["eps_scaler"] = 1.0
        notes += [
            "# In guided_diffusion/gaussian_diffusion.py, the last line that sets sampling_scaler becomes:",
            f"self.sampling_scaler = {list(best.lambdas)}",
        ]
    arguments = " ".join(f"--{name} {value}" for name, value in flags.items())
    return "\n".join([*notes, arguments])


# --- EDM-ES -------------------------------------------------------------------------------------------------


def _edm_es(best: Best) -> str:
    """Arguments of EDM-ES's generate.py.

    It has two samplers: its main one (Heun on EDM's grid), which scales both stages, and, as soon as --solver,
    --disc, --schedule or --scaling is given, another one that scales first stages only, and with scaling vp divides
    (x - x0)/sigma of the scaled state.
    """
    if best.solver not in ("euler", "heun"):
        raise InputError(f"EDM-ES has no {best.solver}, only euler and heun; {_USE_JSON}")
    uniform = _uniform(best)
    if uniform is None:
        raise InputError(
            f"EDM-ES takes one λ for all evaluations, and this schedule has {_told(best)}; {_USE_JSON}, "
            "or search with k: {start: 0, stop: 0}"
        )
    sampling = best.sampling
    ablated = {
        "disc": sampling.get("discretization", "edm"),
        "schedule": sampling.get("schedule", "linear"),
        "scaling": sampling.get("scaling", "none"),
    }
    heun, official = best.solver == "heun", sampling.get("rule") == "edm-es-ablation"
    plain = ablated == {"disc": "edm", "schedule": "linear", "scaling": "none"}
    if uniform != 1 and not official:
        if heun and not plain:
            raise InputError(
                "EDM-ES scales first stages only with another discretization, schedule or scaling than EDM's, and this "
                f"search scaled both: {_USE_JSON}, or search with rule: edm-es-ablation"
            )
        if ablated["scaling"] == "vp":
            raise InputError(
                "EDM-ES divides no noise of the network with scaling vp, and this search did: "
                f"{_USE_JSON}, or search with rule: edm-es-ablation"
            )
    flags: dict[str, Any] = {"steps": (best.nfe + 1) // 2 if heun else best.nfe}
    if not heun or official or not plain:
        flags["solver"] = best.solver
    if not plain:
        flags |= ablated
    defaults = {"sigma_min": None, "sigma_max": None, "rho": 7.0}
    defaults |= {"S_churn": 0.0, "S_min": 0.0, "S_max": None, "S_noise": 1.0}
    flags |= {key: sampling[key] for key, usual in defaults.items() if sampling.get(key, usual) != usual}
    flags["eps_scaler"] = uniform
    return " ".join(f"--{name}={value}" for name, value in flags.items())


# --- ComfyUI ------------------------------------------------------------------------------------------------


def _comfyui(best: Best) -> str:
    """The field of ComfyUI's node "Epsilon Scaling", which divides the noise after guidance, at every evaluation."""
    found = schedule(best)
    value = found.lambdas[0]
    if set(found.lambdas) != {value}:
        raise InputError(
            f"ComfyUI's node takes one factor for all evaluations, and this schedule has {_told(best)}; {_USE_JSON}, "
            "or search with k: {start: 0, stop: 0}"
        )
    low, high = _COMFYUI_RANGE
    if not low <= value <= high:
        raise InputError(
            f"ComfyUI's node takes a factor from {low} to {high}, not {number(value)}; {_USE_JSON}"
        )
    if not math.isclose(value, round(value / _COMFYUI_STEP) * _COMFYUI_STEP, abs_tol=1e-9):
        raise InputError(
            f"ComfyUI's node has steps of {_COMFYUI_STEP} and would round {number(value)}: search b with "
            f"fine: {_COMFYUI_STEP}, or {_USE_JSON}"
        )
    return (
        '# Node "Epsilon Scaling" (model_patches/unet), between the model loader and the sampler:\n'
        f"scaling_factor = {value!r}"
    )


# --- diffusers ----------------------------------------------------------------------------------------------


def _diffusers(best: Best) -> str:
    """Python that applies the schedule to a pipeline with the scheduler of the search."""
    if best.solver != "diffusers":
        raise InputError(
            f"the schedule was searched with lamtune's own {best.solver}, and the schedulers of diffusers visit other "
            f"timesteps: search with solver: diffusers, or {_USE_JSON}"
        )
    name, options = best.sampling.get("scheduler"), dict(best.sampling.get("options") or {})
    eta = options.pop("eta", None)
    # Two evaluations per step but for the last; the helper says so where another scheduler counts otherwise.
    twice = str(name).startswith(("Heun", "KDPM2"))
    call = {"num_inference_steps": (best.nfe + 1) // 2 if twice else best.nfe} | (
        {} if eta is None else {"eta": eta}
    )
    if best.k is None:
        made = f"Schedule.free({list(best.lambdas)})"
    else:
        made = f"Schedule.linear({best.nfe}, k={best.k!r}, b={best.b!r})"
    lines = ["from samplers.apply import scaled_pipeline", "from samplers.schedule import Schedule", ""]
    if name is not None or options:
        kind = name or "type(pipeline.scheduler)"
        arguments = ", ".join(
            ["pipeline.scheduler.config", *(f"{key}={value!r}" for key, value in options.items())]
        )
        if name is not None:
            lines.insert(0, f"from diffusers import {name}")
        lines.append(f"pipeline.scheduler = {kind}.from_config({arguments})")
    lines += [
        f"with scaled_pipeline(pipeline, {made}):",
        f"    images = pipeline({', '.join(f'{key}={value!r}' for key, value in call.items())}).images",
    ]
    return "\n".join(lines)


def _uniform(best: Best) -> float | None:
    """The one λ of the schedule, if it is one."""
    return best.lambdas[0] if set(best.lambdas) == {best.lambdas[0]} else None


def _told(best: Best) -> str:
    return "a λ per evaluation" if best.k is None else f"k = {number(best.k)}, b = {number(best.b)}"


FORMATS: Mapping[str, Callable[[Best], str]] = {
    "json": _json,
    "adm-es": _adm_es,
    "edm-es": _edm_es,
    "comfyui": _comfyui,
    "diffusers": _diffusers,
}
"""What `export` can write."""
