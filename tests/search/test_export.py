"""search.export: other programs get what was searched, to the last digit, or are said to be unable."""

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest

from samplers.apply import load_schedule
from samplers.errors import InputError
from samplers.grids import respaced
from samplers.models.load import load_model
from samplers.sampling import DDIM, DDPM
from samplers.schedule import Schedule
from search.cli import main
from search.export import FORMATS, export, network_times
from search.spec import parse
from storage import Best


def best(solver: str, schedule: Schedule, /, **sampling: Any) -> Best:
    return Best(
        model="m",
        model_fingerprint="0" * 64,
        dataset="d",
        solver=solver,
        sampling={"solver": solver, "nfe": schedule.nfe, **sampling},
        nfe=schedule.nfe,
        k=schedule.k,
        b=schedule.b,
        lambdas=schedule.lambdas,
        parameters={},
        distance=4.31,
        standard_error=0.05,
        baseline_distance=10.36,
        gain=6.05,
        gain_error=0.07,
        significant=True,
        confirmed=True,
        images=10_000,
        seed=0,
        metrics={},
        objective="Fréchet distance",
        evaluator="1" * 64,
        job_id=1,
        number=11,
        status="finished",
        strategy="adaptive",
        trials=12,
        network_evaluations=2_400_000,
        seconds=204.0,
        confirm_network_evaluations=400_000,
        confirm_seconds=34.0,
    )


def flags(line: str) -> dict[str, str]:
    """--name value and --name=value → the values."""
    return dict(re.findall(r"--(\w+)[ =](\S+)", line))


# --- what the programs do with what they are given -------------------------------------------------------------


def adm_es_lambdas(text: str, nfe: int) -> list[float]:
    """The list that ADM-ES divides by, after the patch in `text`: its formulas, with the exported numbers."""
    scaler = float(flags(text.splitlines()[-1])["eps_scaler"])
    listed = re.search(r"^self\.sampling_scaler = (\[.*\])$", text, re.MULTILINE)
    if listed:
        return json.loads(listed[1])
    mean = re.search(r"the mean 1\.011 becomes (\S+)", text)
    if mean:
        start = float(mean[1]) - scaler * ((nfe - 1) / 2)
        return [start + i * scaler for i in range(nfe)]
    return [scaler] * nfe


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tests of the solvers against the official outputs, with every schedule taken through an export."""
    path = Path(__file__).parents[1] / "samplers" / "test_official_vectors.py"
    spec = importlib.util.spec_from_file_location("official_vectors", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "official_vectors", module)  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["adm_ddpm", "adm_ddim"])
def test_the_values_for_adm_es_reproduce_its_outputs(
    shared: Path, official: Any, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    original, formats = official.adm_schedule, set()

    def through_export(lam: Any, nfe: int) -> Schedule:
        schedule = original(lam, nfe)
        solver = folder.removeprefix("adm_")
        text = export(best(solver, schedule), "adm-es")
        formats.add("the mean" in text)
        listed = export(best(solver, Schedule.free(schedule.lambdas)), "adm-es")
        assert adm_es_lambdas(listed, nfe) == list(schedule.lambdas)
        return Schedule.free(adm_es_lambdas(text, nfe))

    monkeypatch.setattr(official, "adm_schedule", through_export)
    findings = official.adm_findings(shared / "reference" / "vectors" / folder)
    assert findings.cases > 0
    assert findings.wrong == []
    assert formats == {True, False}  # linear ones and uniform ones


def test_the_values_for_edm_es_reproduce_its_outputs(
    shared: Path, official: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = official.edm_case
    cases = 0

    def through_export(case: dict[str, Any], file: Any, arrays: Any, grid: Any, seen: Any) -> Any:
        nonlocal cases
        settings = dict(case["settings"])
        ablation = case["sampler"] == "ablation_sampler"
        solver = settings.get("solver", "heun")
        sampling = {
            key: value for key, value in settings.items() if key not in ("num_steps", "eps_scaler", "solver")
        }
        sampling["rule"] = "edm-es-ablation" if ablation else "paper"
        found = best(solver, Schedule.uniform(grid.nfe, settings["eps_scaler"]), **sampling)
        line = flags(export(found, "edm-es"))
        # generate.py takes the other sampler as soon as one of these is given
        assert ablation == bool(line.keys() & {"solver", "disc", "schedule", "scaling"})
        words = {"steps": "num_steps", "disc": "discretization"}
        given = {words.get(key, key): value for key, value in line.items()}
        kinds = {key: type(value) for key, value in settings.items()}
        parsed = {key: kinds.get(key, str)(value) for key, value in given.items()}
        usual = {"solver": "heun", "discretization": "edm", "schedule": "linear", "scaling": "none"}
        assert {**usual, **parsed} == {**usual, **settings}
        cases += 1
        return original(case | {"settings": parsed}, file, arrays, grid, seen)

    monkeypatch.setattr(official, "edm_case", through_export)
    findings = official.edm_findings(shared / "reference" / "vectors" / "edm")
    assert findings.cases == cases > 0
    assert findings.wrong == []


# --- each format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [Schedule.uniform(20, 1.017), Schedule.linear(20, 0.0025, 1.0), Schedule.free([0.99, 1 / 3, 1.02])],
)
def test_json_is_read_back_as_the_same_schedule(tmp_path: Path, schedule: Schedule) -> None:
    (tmp_path / "best.json").write_text(export(best("ddpm", schedule), "json"), encoding="utf-8")
    assert load_schedule(tmp_path / "best.json") == schedule


def test_json_says_what_the_network_is_told_where_that_is_known() -> None:
    content = json.loads(export(best("heun", Schedule.linear(3, 0.1, 1)), "json", [0.002, 0.1, 80.0]))
    assert content["steps"][2] == {"t": 2, "lambda": 1.2, "sigma": 80.0}
    assert json.loads(export(best("ddim", Schedule.linear(2, 0.1, 1)), "json", [0.0, 500.0]))["steps"][1] == {
        "t": 1,
        "lambda": 1.1,
        "timestep": 500.0,
    }
    with pytest.raises(InputError, match="only --format json writes timesteps"):
        export(best("ddpm", Schedule.uniform(2, 1.1)), "adm-es", [0.0, 500.0])


def test_json_has_no_scaling_where_the_official_ablation_sampler_has_none(tmp_path: Path) -> None:
    found = best("heun", Schedule.uniform(5, 1.1), rule="edm-es-ablation", scaling="none")
    (tmp_path / "best.json").write_text(export(found, "json"), encoding="utf-8")
    assert load_schedule(tmp_path / "best.json").lambdas == (1.1, 1.0, 1.1, 1.0, 1.1)
    mixed = best("euler", Schedule.uniform(5, 1.1), rule="edm-es-ablation", scaling="vp")
    for form in ("json", "comfyui"):
        with pytest.raises(InputError, match="divides no noise of the network: only --format edm-es"):
            export(mixed, form)
    assert flags(export(mixed, "edm-es"))["scaling"] == "vp"


@pytest.mark.parametrize("solver", [DDPM("ddpm", 20), DDIM("ddim", 20), DDPM("ddpm", 20, respacing="10,6,4")])
def test_adm_es_visits_the_timesteps_of_the_search(solver: Any) -> None:
    model = load_model("ideal", None, {"time": "discrete", "shape": [1, 2, 2], "std": 1})
    line = flags(
        export(best(solver.solver, Schedule.uniform(20, 1.017), respacing=solver.respacing), "adm-es")
    )
    assert respaced(line["timestep_respacing"], 1000).tolist() == solver.plan(model).times.tolist()
    assert line["use_ddim"] == str(solver.solver == "ddim")
    assert line["eps_scaler"] == "1.017"


def test_edm_es_gets_steps_and_not_evaluations() -> None:
    heun = export(best("heun", Schedule.uniform(35, 1.0006), S_churn=0.0, S_max=None, rule="paper"), "edm-es")
    assert heun == "--steps=18 --eps_scaler=1.0006"
    euler = export(best("euler", Schedule.uniform(13, 1.0048), rho=5.0, S_churn=20.0), "edm-es")
    assert euler == "--steps=13 --solver=euler --rho=5.0 --S_churn=20.0 --eps_scaler=1.0048"


def test_numbers_of_the_solver_that_were_searched_take_the_place_of_the_jobs() -> None:
    found = best("heun", Schedule.uniform(5, 1.001), S_churn=40.0, S_noise=1.003)
    found = replace(found, parameters={"S_noise": 1.0065})
    assert export(found, "edm-es") == "--steps=3 --S_churn=40.0 --S_noise=1.0065 --eps_scaler=1.001"
    assert json.loads(export(found, "json"))["sampling"]["S_noise"] == 1.0065
    ddim = replace(best("ddim", Schedule.uniform(5, 1.1), eta=0.0), parameters={"eta": 0.5})
    with pytest.raises(InputError, match="with eta 0"):
        export(ddim, "adm-es")


def test_comfyui_gets_one_factor_that_it_divides_by() -> None:
    assert export(best("ddpm", Schedule.uniform(20, 1.017)), "comfyui").endswith("scaling_factor = 1.017")


def test_the_snippet_for_diffusers_samples_with_the_scheduler_of_the_search(folders: Any) -> None:
    pipeline = diffusers.DDIMPipeline(folders.unet(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    options = {"timestep_spacing": "trailing", "eta": 0.5}
    found = best("diffusers", Schedule.linear(5, 0.01, 0.97), scheduler="DDIMScheduler", options=options)
    names: dict[str, Any] = {"pipeline": pipeline}
    exec(export(found, "diffusers"), names)
    assert names["images"][0].size == (8, 8)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    found = best("diffusers", Schedule.free([1, 1.5]), scheduler=None, options={})
    exec(export(found, "diffusers"), names)
    assert len(pipeline.scheduler.timesteps) == 2
    heun = best("diffusers", Schedule.uniform(7, 1.1), scheduler="HeunDiscreteScheduler", options={})
    assert "num_inference_steps=4)" in export(heun, "diffusers")


@pytest.mark.parametrize(
    ("form", "solver", "schedule", "sampling", "message"),
    [
        ("adm-es", "heun", Schedule.uniform(5, 1.1), {}, "ADM-ES has no heun"),
        ("adm-es", "ldm_ddim", Schedule.uniform(5, 1.1), {}, "ADM-ES has no ldm_ddim"),
        ("adm-es", "ddim", Schedule.uniform(5, 1.1), {"eta": 0.5}, "with eta 0"),
        ("edm-es", "ddpm", Schedule.uniform(5, 1.1), {}, "EDM-ES has no ddpm"),
        ("edm-es", "heun", Schedule.linear(5, 0.1, 1), {}, "one λ for all .* k = 0.1, b = 1"),
        ("edm-es", "euler", Schedule.free([1, 1.1]), {}, "one λ for all .* a λ per evaluation"),
        ("edm-es", "heun", Schedule.uniform(5, 1.1), {"discretization": "vp"}, "scales first stages only"),
        ("edm-es", "euler", Schedule.uniform(5, 1.1), {"scaling": "vp"}, "divides no noise of the network"),
        ("comfyui", "ddpm", Schedule.linear(5, 0.1, 1), {}, "one factor for all .* k = 0.1, b = 1"),
        ("comfyui", "heun", Schedule.uniform(5, 1.1), {"rule": "edm-es-ablation"}, "one factor for all"),
        ("comfyui", "ddpm", Schedule.uniform(5, 1.0005), {}, "steps of 0.001 and would round 1.0005"),
        ("comfyui", "ddpm", Schedule.uniform(5, 1.6), {}, "from 0.5 to 1.5, not 1.6"),
        (
            "diffusers",
            "ddpm",
            Schedule.uniform(5, 1.1),
            {},
            "visit other timesteps: search with solver: diffusers",
        ),
    ],
)
def test_what_a_program_cannot_express_is_said_and_not_rounded(
    form: str, solver: str, schedule: Schedule, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(best(solver, schedule, **sampling), form)


def test_no_scaling_can_be_expressed_by_every_rule() -> None:
    found = best("heun", Schedule.uniform(5, 1.0), discretization="vp")
    assert shlex.split(export(found, "edm-es"))[-1] == "--eps_scaler=1.0"


# --- times, from the network -------------------------------------------------------------------------------------

JOB = {
    "model": {"name": "m", "format": "ideal", "options": {"time": "discrete", "shape": [1, 8, 8], "std": 1}},
    "dataset": {"name": "digits", "reference": "digits"},
    "features": "digits",
    "sampling": {"solver": "ddpm", "nfe": [5, 20]},
}


def test_times_come_from_the_network_of_the_search(tmp_path: Path) -> None:
    spec = parse(JOB, "job.yaml", tmp_path)
    model = load_model("ideal", None, spec.model.options)
    found = replace(best("ddpm", Schedule.uniform(20, 1.1)), sampling=asdict(spec.sampling[1]))
    with pytest.raises(InputError, match="--job: its network is not that of the schedule"):
        network_times(spec, found)
    found = replace(found, model_fingerprint=model.fingerprint)
    assert network_times(spec, found) == respaced("20", 1000).tolist()
    other = replace(found, sampling={**found.sampling, "clip": False})
    with pytest.raises(InputError, match="--job: none of its samplings"):
        network_times(spec, other)


def test_every_format_has_a_word_on_the_command_line() -> None:
    (choice,) = [option.type for option in main.commands["export"].params if option.name == "form"]
    assert list(choice.choices) == list(FORMATS)
