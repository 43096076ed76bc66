"""search.tuner and search.evaluator: the metrics of confirming evaluations are those of their images and features."""

import numpy as np
import optuna
import pytest
import torch
from optuna.artifacts import get_all_artifact_meta
from rich.console import Console

from benchmarks.jobs import GAUSS
from objectives import losses
from objectives.losses import LOSSES
from objectives.metrics import METRICS, Generated, Real, measure
from objectives.moments import Moments
from objectives.paired import block_means, difference_error, standard_error
from objectives.reference import DIGITS_IMAGES, DIGITS_REFERENCE, read_images
from samplers.errors import InputError
from samplers.schedule import Schedule
from search import figures, runner
from search.evaluator import Evaluator
from search.spec import parse
from storage import CONFIRM, Pictures, open_store

JOB = {
    **GAUSS,
    "sampling": {"solver": "ddpm", "nfe": 4},
    "search": {
        "strategy": "paper",
        "images": 300,
        "confirm": 520,
        "b": {"coarse": 0.1, "fine": 0.1},
        "k": {"start": 0, "stop": 0},
    },
    "resources": {"workers": 2},
}
NAMES = list(METRICS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "cache"))


def url_of(folder):
    return f"sqlite:///{folder}/store.db"


def submitted(job, folder):
    url = url_of(folder)
    (done,) = runner.submit(parse(job, "job.yaml", folder), url, Console(quiet=True))
    with open_store(url) as store:
        return done, store.evaluations(done.id), store.best("gauss", "digits", 4)


@pytest.mark.usefixtures("local_ray")
def test_metrics_and_pictures_are_of_the_images_of_the_confirming_evaluations_and_reused_with_them(tmp_path):
    job = {**JOB, "metrics": NAMES}
    done, evaluations, best = submitted(job, tmp_path)
    confirming = [e for e in evaluations if e.phase == CONFIRM]
    assert len(confirming) == 2
    assert all(e.metrics == {} for e in evaluations if e.phase != CONFIRM)
    spec = parse(job, "job.yaml", tmp_path)
    alone = Evaluator.load(spec, torch.device("cpu"))
    real = Real.of(torch.cat([alone.extractor(batch) for batch in read_images("digits", (1, 8, 8))]))
    for e in confirming:
        schedule = Schedule(e.lambdas, e.k, e.b)
        features = torch.tensor(alone.sample(spec.sampling[0], schedule, 0, 520, seed=e.seed).features)
        wanted = measure(NAMES, Generated(features, alone.extractor.logits(features)), real)
        assert dict(e.metrics) == pytest.approx(wanted, rel=1e-9)
    assert best.metrics == next(e for e in confirming if e.number == best.number).metrics

    # Each has a picture of its first images, attached to its trial.
    study = optuna.load_study(study_name=done.study_name, storage=url_of(tmp_path))
    with open_store(url_of(tmp_path)) as store:
        pictures = store.pictures(done.id)
        for e in confirming:
            (artifact,) = get_all_artifact_meta(study.trials[e.number], storage=study._storage)
            assert (artifact.filename, artifact.mimetype) == ("images.png", "image/png")
            assert Pictures(store).open_reader(artifact.artifact_id).read() == pictures[e.id]
            schedule = Schedule(e.lambdas, e.k, e.b)
            sampler = alone._sampler(spec.sampling[0], e.seed)
            assert pictures[e.id] == figures.grid(sampler.images(schedule, 0, 64))
    assert len(pictures) == 2

    # With fewer of them it is another job, and nothing is sampled: all is known.
    other, again, _ = submitted({**job, "metrics": NAMES[:2]}, tmp_path)
    assert other.id != done.id
    assert {e.reused is not None for e in again} == {True}
    assert [e.metrics for e in again if e.phase == CONFIRM] == [e.metrics for e in confirming]
    with open_store(url_of(tmp_path)) as store:
        assert sorted(store.pictures(other.id).values()) == sorted(pictures.values())
    # Those of a job without metrics lack what this one asks for: the distance is the same, measured again.
    _, before, _ = submitted({**JOB, "search": {**JOB["search"], "seed": 1}}, tmp_path)
    _, after, _ = submitted({**job, "search": {**JOB["search"], "seed": 1}}, tmp_path)
    assert [e.distance for e in after] == pytest.approx([e.distance for e in before], rel=1e-9)
    assert {e.phase for e in after if e.reused is None} == {CONFIRM}
    assert all(e.metrics.keys() == set(NAMES) for e in after if e.phase == CONFIRM)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("objective", LOSSES)
def test_any_metric_may_be_what_the_search_minimises(tmp_path, objective):
    job = {**JOB, "objective": objective}
    done, evaluations, best = submitted(job, tmp_path)
    assert done.evaluator.objective == best.objective == LOSSES[objective].label
    spec = parse(job, "job.yaml", tmp_path)
    alone = Evaluator.load(spec, torch.device("cpu"))
    real = Real.of(torch.cat([alone.extractor(batch) for batch in read_images("digits", (1, 8, 8))]))
    wanted = {}
    for e in evaluations:
        schedule = Schedule(e.lambdas, e.k, e.b)
        features = torch.tensor(alone.sample(spec.sampling[0], schedule, 0, e.images, seed=e.seed).features)
        made = Generated(features, alone.extractor.logits(features))
        loss, influences = losses.measure(objective, made, real)
        assert e.distance == pytest.approx(loss, rel=1e-9)
        blocks = None if influences is None else block_means(influences.numpy())
        wanted[e.seed, e.is_baseline] = wanted.get((e.seed, e.is_baseline), blocks)
        assert (e.standard_error is None) == (blocks is None) == (objective == "recall")
        if blocks is not None:
            assert e.standard_error == pytest.approx(standard_error(blocks), rel=1e-4)
            assert e.gain_error == pytest.approx(difference_error(blocks, wanted[e.seed, True]), rel=1e-3)
        if e.phase == CONFIRM:  # the Fréchet distance beside it, at no cost
            distance = alone.frechet.distance(Moments.of(features))
            assert dict(e.metrics) == {"frechet": pytest.approx(distance, rel=1e-9)}
    assert best.distance == min(e.distance for e in evaluations if e.phase == CONFIRM)
    # It does not compare with a search for something else.
    assert done.evaluator.fingerprint != alone.fingerprint


def test_an_objective_is_refused_where_it_is_not_known_or_has_no_error_bars_that_a_strategy_needs(tmp_path):
    with pytest.raises(InputError, match="objective: Input should be 'frechet', 'kid', .*got 'fid'"):
        submitted({**JOB, "objective": "fid"}, tmp_path)
    with pytest.raises(InputError, match="objective: recall has no error bars, .* give strategy: paper"):
        submitted({**JOB, "objective": "recall", "search": {"strategy": "adaptive"}}, tmp_path)


def test_metrics_that_need_real_images_are_refused_where_there_are_statistics_only(tmp_path):
    (tmp_path / "stats.npz").write_bytes(DIGITS_REFERENCE.read_bytes())
    statistics = {**JOB, "dataset": {"name": "digits", "reference": "stats.npz"}, "metrics": ["kid"]}
    with pytest.raises(InputError, match="metrics: kid needs the real images .* as dataset.images"):
        submitted(statistics, tmp_path)
    (tmp_path / "images.npz").write_bytes(DIGITS_IMAGES.read_bytes())
    evaluator = Evaluator.load(parse(JOB, "job.yaml", tmp_path), torch.device("cpu"))
    with np.load(DIGITS_IMAGES) as images:
        count = len(images["arr_0"])
    named = parse({**statistics, "dataset": {**statistics["dataset"], "images": "images.npz"}}, "j", tmp_path)
    assert evaluator.real(named.dataset)[0].shape == (count, 64)
    with pytest.raises(InputError, match="metrics: 'fid' is not known"):
        submitted({**JOB, "metrics": ["fid"]}, tmp_path)
