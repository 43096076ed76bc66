"""search.diagnose and search.figures: a job's network measured, told, drawn and read again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from PIL import Image

from objectives.frechet import FrechetReference
from objectives.moments import Moments
from objectives.reference import read_images
from samplers.errors import InputError
from samplers.schedule import Schedule
from search import dashboard, figures, findings, pages, plots
from search.bias import Diagnosis, as_text, named, read
from search.cli import main
from search.diagnose import diagnose
from search.evaluator import Evaluator
from search.spec import JobSpec, parse
from storage import Store, open_store

CPU = torch.device("cpu")
TITLES = ("Exposure bias", "Sampling that starts late")
CLOUD = {"time": "discrete", "shape": [1, 8, 8], "points": 40, "seed": 1}


def job(folder: Path, **changes: Any) -> JobSpec:
    content = {
        "model": {"name": "cloud", "format": "ideal", "options": CLOUD},
        "dataset": {"name": "digits", "reference": "digits"},
        "features": "digits",
        "sampling": {"solver": "ddim", "nfe": 5},
    }
    return parse({**content, **changes}, "job.yaml", folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    spec = job(tmp_path_factory.mktemp("job"))
    one, other = Schedule.uniform(5, 1.0), Schedule.linear(5, 0.02, 0.9)
    return diagnose(
        spec,
        Evaluator.load(spec, CPU),
        spec.sampling[0],
        [(named(one), one), (named(other), other)],
        images=700,  # in two batches
        late=[3, 1],
    )


def test_everything_is_there_once_per_evaluation(found: Diagnosis) -> None:
    assert (found.form, found.images, found.nfe, found.real_images) == ("full", 700, 5, 1797)
    for values in (found.times, found.alpha, found.sigma, found.training, found.floor):
        assert len(values) == 5
    one, other = found.schedules
    assert (one.name, other.name) == ("λ = 1", "λ_t = 0.02·t + 0.9")
    for sampled in found.schedules:
        assert len(sampled.norms) == len(sampled.deltas) == 5
        assert [late.t for late in sampled.late] == [3, 1]
        np.testing.assert_allclose(sampled.scaled, np.divide(sampled.norms, sampled.lambdas))
        np.testing.assert_allclose(found.ratios(sampled), np.divide(sampled.scaled, found.training))
    # The first states are pure noise for both; then λ moves them.
    assert one.norms[4] == other.norms[4]
    assert one.norms[0] != other.norms[0]


def test_a_summary_counts_where_the_noise_is_too_large_and_where_a_schedule_lessens_it(
    found: Diagnosis,
) -> None:
    one, other = found.schedules
    over = [sum(ratio > 1 for ratio in found.ratios(sampled)) for sampled in found.schedules]
    assert found.summary(one) == f"‖ε‖ above training at {over[0]} of 5 evaluations"
    lessened = np.sum(np.less(np.divide(other.norms, other.lambdas), one.norms))
    assert (
        found.summary(other)
        == f"‖ε/λ‖ above training at {over[1]} of 5 evaluations, below λ = 1 at {lessened}"
    )


def test_the_floor_lies_below_the_states_of_sampling_which_are_of_other_data(found: Diagnosis) -> None:
    assert found.schedules[0].deltas[0] > 10 * found.floor[0]
    assert found.schedules[0].deltas[4] == pytest.approx(found.floor[4], rel=0.2)  # noise is noise


def test_starting_from_real_states_with_little_noise_leads_nearer_to_the_real_data(found: Diagnosis) -> None:
    from_noise, (far, near) = found.schedules[0].distance, found.schedules[0].late
    assert near.distance < from_noise
    assert near.distance < far.distance


def test_the_distance_is_that_of_a_search(found: Diagnosis, tmp_path: Path) -> None:
    spec = job(tmp_path)
    evaluator = Evaluator.load(spec, CPU)
    sampled = evaluator.sample(spec.sampling[0], Schedule.uniform(5, 1.0), 0, 700)
    moments = Moments.of(torch.tensor(sampled.features))
    assert found.schedules[0].distance == pytest.approx(evaluator.frechet.distance(moments), rel=1e-9)


def test_a_diagnosis_is_read_again_and_drawn(found: Diagnosis, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(found.as_dict()), encoding="utf-8")
    again = read(tmp_path / "d.json")
    assert again == found
    older = found.as_dict() | {"kept": "by another version"}
    assert Diagnosis.from_dict(older) == found
    text = as_text(found)
    assert text.count("│") == 6 * 3
    assert "(2) λ_t = 0.02·t + 0.9: distance" in text
    for ending in ("png", "svg"):
        path = tmp_path / f"d.{ending}"
        figures.save_plot(plots.exposure(again), path)
        assert path.stat().st_size > 10_000
    with Image.open(tmp_path / "d.png") as image:
        colours = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colours  # a curve for each schedule
    with pytest.raises(InputError, match=r"d\.gifs: "):
        figures.save_plot(plots.exposure(again), tmp_path / "d.gifs")
    with pytest.raises(InputError, match="cannot be written"):
        figures.save_plot(plots.exposure(again), tmp_path / "no" / "d.png")


def test_it_is_kept_with_the_newest_search_of_its_network_and_shown_by_report_and_dashboard(
    found: Diagnosis, store: Store, play: Any
) -> None:
    made = {"model": "cloud", "dataset": "digits", "nfe": 5, "solver": "ddim"}
    sampling = {**found.sampling, "precision": "bfloat16"}
    other = play(store, **made, sampling=sampling, study_name="other weights")
    assert dashboard.keep(store, found) is None
    old, new = (
        play(store, **made, sampling=sampling, study_name=name, model_fingerprint=found.model_fingerprint)
        for name in ("old", "new")
    )
    kept = dashboard.keep(store, found)
    assert kept is not None
    assert kept.id == new.id
    shown = findings.of_job(store, new.id)
    assert shown.diagnosis == found
    assert shown.plots[-1] == plots.exposure(found)
    assert all(findings.of_job(store, job.id).diagnosis is None for job in (old, other))

    bias, late = (next(one for one in shown.tables if one.title == title) for title in TITLES)
    assert [row[0] for row in bias.rows] == ["4", "3", "2", "1", "0"]
    one, other = found.schedules
    columns = dict(zip(bias.header, zip(*bias.rows, strict=True), strict=True))
    for name, wanted in (
        ("‖ε‖ (1)", one.norms),
        ("ratio (1)", found.ratios(one)),
        ("‖ε‖ (2)", other.norms),
        ("‖ε/λ‖ (2)", other.scaled),
        ("ratio (2)", found.ratios(other)),
    ):
        assert [float(cell) for cell in columns[name]] == pytest.approx(wanted[::-1], abs=1e-4), name
    assert "‖ε/λ‖ (1)" not in columns
    assert [row[0] for row in late.rows] == ["λ = 1", "λ_t = 0.02·t + 0.9"]
    assert float(late.rows[1][3]) == pytest.approx(found.schedules[1].late[1].distance, abs=1e-4)
    for form in ("html", "md", "tex"):
        text = pages.write(shown, form, Path("plots"))
        assert all(title in text for title in TITLES)
        assert late.rows[1][3] in text
        assert form != "tex" or text.isascii()
    assert "exposure-bias.svg" in pages.write(shown, "md", Path("plots"))
    content = json.loads(pages.write(shown, "json"))["diagnosis"]
    assert Diagnosis.from_dict(content) == found
    storage = store.optuna_storage()
    study = storage.get_study_system_attrs(storage.get_study_id_from_name("new"))
    assert json.loads(get_plotly_graph_objects(study)["exposure-bias"])["data"][0]["y"] == list(
        found.training
    )


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"schedules": [{"late": 3}]}'])
def test_a_file_without_a_diagnosis_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(InputError, match=r"d\.json"):
        read(tmp_path / "d.json")


def test_states_too_large_for_covariances_are_compared_by_their_variances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("objectives.states._FULL_UP_TO", 63)
    spec = job(tmp_path)
    one = Schedule.uniform(5, 1.0)
    found = diagnose(spec, Evaluator.load(spec, CPU), spec.sampling[0], [(named(one), one)], images=50)
    assert found.form == "diagonal"
    assert "of means and variances" in as_text(found)


@pytest.mark.parametrize(
    ("changes", "late", "message"),
    [
        ({}, [0], "sampling can start at evaluation 1 to 4, not 0"),
        ({"sampling": {"solver": "ldm_ddim", "nfe": 5}}, [2], "--late: ldm_ddim cannot start late"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_sampled(
    tmp_path: Path, changes: dict[str, Any], late: list[int], message: str
) -> None:
    spec = job(tmp_path, **changes)
    evaluator = Evaluator.load(spec, CPU)
    one = Schedule.uniform(5, 1.0)
    with pytest.raises(InputError, match=message):
        diagnose(spec, evaluator, spec.sampling[0], [("λ = 1", one)], images=50, late=late)


def test_a_job_with_statistics_alone_is_told_what_it_lacks(tmp_path: Path) -> None:
    evaluator = Evaluator.load(job(tmp_path), CPU)
    evaluator.reference.save(tmp_path / "stats.npz")
    spec = job(tmp_path, dataset={"name": "digits", "reference": "stats.npz"})
    one = Schedule.uniform(5, 1.0)
    with pytest.raises(InputError, match="needs the real images: .* as dataset.images"):
        diagnose(spec, evaluator, spec.sampling[0], [("λ = 1", one)], images=50)


def test_the_bundled_images_are_those_of_the_bundled_statistics(tmp_path: Path) -> None:
    evaluator = Evaluator.load(job(tmp_path), CPU)
    features = torch.cat([evaluator.extractor(batch) for batch in read_images("digits", (1, 8, 8))])
    assert FrechetReference.of(evaluator.reference.gaussian()).distance(
        Moments.of(features)
    ) == pytest.approx(0, abs=1e-8)


# --- the command ---------------------------------------------------------------------------------------------

TEXT = """\
model: {name: cloud, format: ideal, options: {time: sigma, shape: [1, 8, 8], points: 40}}
dataset: {name: digits, reference: digits}
features: digits
sampling: {solver: heun, nfe: [5, 7]}
"""


def run(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def test_the_command_measures_writes_and_draws(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(TEXT)
    words = ("diagnose", tmp_path / "job.yaml", "--images", 40, "--store", f"sqlite:///{tmp_path}/s.db")
    result = run(
        *words, "--nfe", 7, "--schedule", "0.01,0.98", "--schedule", "0,1.02", "--late", "4", "--json",
        "-o", tmp_path / "d.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert json.loads(result.stdout) == content
    assert [one["lambdas"][6] for one in content["schedules"]] == [1.0, pytest.approx(1.04), 1.02]
    assert content["schedules"][2]["scaled"] == [
        pytest.approx(norm / 1.02) for norm in content["schedules"][2]["norms"]
    ]
    assert content["schedules"][1]["late"][0]["t"] == 4
    again = run("diagnose", tmp_path / "d.json", "--plot", tmp_path / "d.svg", *words[-2:])
    assert again.exit_code == 0, again.output
    assert "has no job of this network and solver to keep it with" in again.stderr
    assert "from real states at t = 4" in again.output
    assert (tmp_path / "d.svg").read_text(encoding="utf-8").startswith("<?xml")
    for wrong, message in (
        ((), "--nfe: name one of the job's samplings; it has NFE 5, 7"),
        (("--nfe", 6), "it has NFE 5, 7"),
        (("--nfe", 7, "--schedule", "1"), "give best, or K,B"),
        (("--nfe", 7, "--schedule", "a,b"), "is no list of numbers"),
        (("--nfe", 7, *(("--schedule", "0,1.01") * 4)), "--schedule: at most 3"),
        (("--nfe", 7, "--late", "x"), "--late: 'x' is no list of numbers"),
        (("--nfe", 7, "--late", "3"), "where a step begins, at evaluation 0, 2, 4, 6, not 3"),
        (("--nfe", 7, "--schedule", "best"), "has no result for model cloud"),
    ):
        refused = run(*words, *wrong)
        assert refused.exit_code in (1, 2)
        assert message in refused.output


def test_best_is_the_schedule_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text(TEXT)
    url = f"sqlite:///{tmp_path}/s.db"
    with open_store(url):
        pass
    asked: dict[str, Any] = {}

    class Found:
        lambdas, k, b = (0.97, 0.98, 0.99, 1.0, 1.01), 0.01, 0.97

    def best(_: Any, **words: Any) -> Any:
        asked.update(words)
        return Found

    monkeypatch.setattr("storage.store.Store.best", best)
    result = run(
        "diagnose",
        tmp_path / "job.yaml",
        "--nfe",
        5,
        "--images",
        10,
        "--schedule",
        "best",
        "--store",
        url,
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert asked == {"model": "cloud", "dataset": "digits", "nfe": 5, "solver": "heun"}
    assert json.loads(result.stdout)["schedules"][1]["lambdas"] == list(Found.lambdas)
