"""search.runner: whole jobs over real Ray workers, and what interrupts them."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest
import torch
import yaml
from rich.console import Console
from sqlalchemy import Engine, event

from benchmarks.jobs import GAUSS
from benchmarks.servers import WORKER, postgresql, postgresql_programs, sampler_workers, title
from samplers.errors import InputError, LamtuneError
from search import runner
from search.spec import parse
from storage import Store, open_store

JOB = {
    **GAUSS,
    "sampling": {"solver": "ddpm", "nfe": 5},
    "search": {
        "strategy": "paper",
        "images": 600,
        "confirm": 0,
        "rungs": [100, 300],
        "b": {"coarse": 0.1, "fine": 0.05},
        "k": {"start": 0, "stop": 0},
    },
    "resources": {"workers": 1},
}


@pytest.fixture
def quiet():
    return Console(quiet=True)


@pytest.fixture(autouse=True)
def nothing_is_known(forget):
    """Every test computes what it needs."""


def changed(section, **keys):
    return {**JOB, section: {**JOB[section], **keys}}


def submitted(job, folder, console, name="store.db"):
    url = f"sqlite:///{folder}/{name}"
    jobs = runner.submit(parse(job, "job.yaml", folder), url, console)
    with open_store(url) as store:
        return jobs, [store.evaluations(j.id) for j in jobs]


@pytest.mark.usefixtures("local_ray")
def test_the_same_job_gives_the_same_distances_on_any_number_of_workers(tmp_path, quiet, forget):
    results = {}
    for workers, micro_batch in ((1, "auto"), (2, 64), (3, 37)):
        forget()
        job = changed("resources", workers=workers, micro_batch=micro_batch)
        _, (evaluations,) = submitted(job, tmp_path, quiet, f"{workers}.db")
        results[workers] = [(e.lambdas, e.images, dict(e.rungs)) for e in evaluations]
    assert len(results[1]) >= 4
    for workers in (2, 3):
        for (lambdas, images, rungs), other in zip(results[1], results[workers], strict=True):
            assert (lambdas, images, list(rungs)) == (other[0], other[1], list(other[2]))
            for n, distance in rungs.items():
                assert math.isclose(distance, other[2][n], rel_tol=1e-9)


@pytest.mark.usefixtures("local_ray")
def test_several_nfe_make_several_jobs_and_a_finished_job_is_not_run_again(tmp_path, quiet):
    job = changed("sampling", nfe=[4, 5])
    jobs, evaluations = submitted(job, tmp_path, quiet)
    assert [(j.nfe, j.status) for j in jobs] == [(4, "finished"), (5, "finished")]
    assert all({e.state for e in of_job} == {"complete"} for of_job in evaluations)
    assert all(
        e.network_evaluations == 600 * j.nfe
        for j, of_job in zip(jobs, evaluations, strict=True)
        for e in of_job
    )
    again, unchanged = submitted(job, tmp_path, quiet)
    assert again == jobs
    assert unchanged == evaluations


@pytest.mark.usefixtures("local_ray")
def test_a_job_with_another_seed_is_another_job_with_other_distances(tmp_path, quiet):
    (first,), (one,) = submitted(JOB, tmp_path, quiet)
    (second,), (other,) = submitted(changed("search", seed=1), tmp_path, quiet)
    assert first.id != second.id
    assert one[0].lambdas == other[0].lambdas
    assert one[0].distance != other[0].distance


@pytest.mark.usefixtures("local_ray")
def test_a_model_that_diverges_fails_its_trials_and_the_job_says_so(tmp_path, quiet):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x, t):\n"
        "        return torch.where(t[:, None, None, None] > 900, x, float('nan') * x)\n"
        "def make():\n"
        "    return Net()\n"
    )
    options = {"shape": [1, 8, 8], "time": "discrete", "prediction": "epsilon"}
    job = {**JOB, "model": {"name": "nan", "format": "python", "path": "net.py:make", "options": options}}
    url = f"sqlite:///{tmp_path}/store.db"
    with pytest.raises(LamtuneError, match="no schedule has a finite distance"):
        runner.submit(parse(job, "job.yaml", tmp_path), url, quiet)
    with open_store(url) as store:
        (stored,) = store.jobs()
        assert stored.status == "failed"
        states = {(e.state, e.error) for e in store.evaluations(stored.id)}
        assert states == {("failed", "sampling gave images that are not finite")}


@pytest.mark.usefixtures("local_ray")
def test_features_that_are_not_finite_fail_their_trial_and_not_the_search(tmp_path, quiet):
    class Broken(torch.nn.Module):
        def forward(self, x):
            mean = x.double().mean((2, 3))
            return torch.cat([mean, mean.square(), mean * float("nan")], 1)

    torch.jit.script(Broken()).save(str(tmp_path / "features.ts"))
    np.savez(tmp_path / "stats.npz", mu=np.ones(3), sigma=np.eye(3))
    job = {**JOB, "dataset": {"name": "d", "reference": "stats.npz"}, "features": "features.ts"}
    url = f"sqlite:///{tmp_path}/store.db"
    with pytest.raises(LamtuneError, match="no schedule has a finite distance"):
        runner.submit(parse(job, "job.yaml", tmp_path), url, quiet)
    with open_store(url) as store:
        evaluations = store.evaluations(1)
    assert len(evaluations) > 1
    assert all(e.state == "failed" and "NaN" in e.error for e in evaluations)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (changed("dataset", reference="absent"), "absent: no such file or folder"),
        (changed("model", format="adm", path="absent.pt", options={}), "absent.pt"),
        (changed("model", format="sdxl"), "model.format must be one of .*adm.*'sdxl'"),
        (changed("sampling", solver="heun", nfe=7), "sampling.solver: heun needs a sigma-based network"),
        (changed("sampling", nfe=2000), "sampling.nfe: 2000 sampling steps were asked.*1000"),
        (changed("sampling", solver="ddim", nfe=70), "sampling.nfe: .*ddim67.*ddim72"),
        (changed("search", b={"coarse": 0.0}), "search.b.coarse"),
        (changed("search", b={"stride": 0.1}), "b.stride is not a key"),
        ({**JOB, "features": "inception-v9"}, "features: .*inception-v9"),
    ],
)
def test_what_cannot_run_is_refused_before_ray_starts(job, message, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(runner.pool.ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match=message):
        runner.submit(parse(job, "job.yaml", tmp_path), f"sqlite:///{tmp_path}/s.db", quiet)


def test_statistics_of_other_features_are_refused_with_both_dimensions(tmp_path, quiet):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match=r"stats\.npz.*2048.*64"):
        runner.submit(
            parse(changed("dataset", reference="stats.npz"), "job.yaml", tmp_path),
            f"sqlite:///{tmp_path}/s.db",
            quiet,
        )


def test_more_gpus_than_there_are_are_refused(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"resources\.workers: 5 were asked for.*this machine has 2 GPU"):
        runner.submit(
            parse(changed("resources", workers=5), "job.yaml", tmp_path), f"sqlite:///{tmp_path}/s.db", quiet
        )


def test_a_job_that_another_process_runs_is_left_alone(tmp_path, quiet, local_ray):
    (job,), _ = submitted(JOB, tmp_path, quiet)
    with open_store(f"sqlite:///{tmp_path}/store.db") as store:
        store.set_status(job.id, "queued")
        assert store.claim(job.id, stale_after=60)
        with pytest.raises(LamtuneError, match="is being run by another process"):
            runner.submit(parse(JOB, "job.yaml", tmp_path), store.safe_url, quiet)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("by", "raised", "noted"),
    [
        ("store", "job 1 was cancelled; submit it again to go on", "cancelled on request"),
        ("signal", str(int(signal.SIGTERM)), "stopped by SIGTERM"),
    ],
)
def test_a_job_that_is_to_end_does_so_though_its_first_interrupt_is_lost(
    tmp_path, quiet, monkeypatch, by, raised, noted
):
    interrupts = []

    def run_trials(*args):
        deadline = time.monotonic() + 30
        try:
            if by == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                with open_store(f"sqlite:///{tmp_path}/store.db") as store:
                    store.cancel(1, stale_after=60)
            while time.monotonic() < deadline:
                time.sleep(0.05)
        except SystemExit:
            interrupts.append("lost")  # as Python does it with what is raised in a finaliser
        while time.monotonic() < deadline:
            time.sleep(0.05)
        interrupts.append("never heard")

    monkeypatch.setattr(runner, "_HEARTBEAT_S", 0.2)
    monkeypatch.setattr(runner.tuner, "run_trials", run_trials)
    with pytest.raises((LamtuneError, SystemExit), match=raised):
        submitted(JOB, tmp_path, quiet)
    assert interrupts == ["lost"]
    with open_store(f"sqlite:///{tmp_path}/store.db") as store:
        job = store.job(1)
    assert (job.status, job.error, job.finished_at is None) == ("cancelled", noted, False)


@pytest.mark.usefixtures("local_ray")
def test_a_job_is_resumed_by_its_number_from_what_the_store_has_of_its_file(tmp_path, quiet):
    jobs, before = submitted(changed("sampling", nfe=[4, 5]), tmp_path, quiet)
    url = f"sqlite:///{tmp_path}/store.db"
    with open_store(url) as store:
        for job in jobs:
            store.set_status(job.id, "cancelled")
        assert [job.id for job in runner.resume(jobs[1].id, url, quiet)] == [jobs[1].id]
        assert [store.job(job.id).status for job in jobs] == ["cancelled", "finished"]
        assert [store.evaluations(job.id) for job in jobs] == before


@pytest.mark.usefixtures("local_ray")
def test_a_job_whose_files_have_changed_is_not_resumed_and_the_file_is_named(tmp_path, quiet):
    def write(scale, mean):
        (tmp_path / "net.py").write_text(
            "import torch\n"
            "def make():\n"
            f"    return torch.nn.Conv2d(1, 1, 1).requires_grad_(False).apply(fill)\n"
            "def fill(net):\n"
            f"    net.weight.fill_({scale}); net.bias.fill_(0.0); net.forward = lambda x, t: "
            "torch.nn.functional.conv2d(x, net.weight, net.bias)\n"
        )
        np.savez(tmp_path / "stats.npz", mu=np.full(64, mean), sigma=np.eye(64))

    options = {"shape": [1, 8, 8], "time": "discrete", "prediction": "epsilon"}
    job = {**JOB, "model": {"name": "net", "format": "python", "path": "net.py:make", "options": options}}
    job["dataset"] = {"name": "d", "reference": "stats.npz"}
    write(0.5, 0.0)
    (stored,), _ = submitted(job, tmp_path, quiet)
    url = f"sqlite:///{tmp_path}/store.db"
    for changes, message in (
        ((0.6, 0.0), rf"model\.path \({tmp_path}/net\.py\) has changed since"),
        ((0.5, 1.0), rf"dataset\.reference \({tmp_path}/stats\.npz\) has changed since"),
    ):
        write(*changes)
        with pytest.raises(InputError, match=message):
            runner.resume(stored.id, url, quiet)
    write(0.5, 0.0)
    assert runner.resume(stored.id, url, quiet)[0].id == stored.id


def test_a_second_search_on_a_sqlite_file_is_sent_to_postgresql(tmp_path, quiet):
    url = f"sqlite:///{tmp_path}/store.db"
    with open_store(url) as store, store.only_writer():
        with pytest.raises(InputError, match="SQLite serves one process.*postgresql://"):
            runner.submit(parse(JOB, "job.yaml", tmp_path), url, quiet)
        assert store.jobs() == ()


@contextmanager
def workers_killed(*calls):
    """Kill a worker of `local_ray` amid each of these calls in turn, at any time inside of the block."""
    left, over = list(calls), threading.Event()

    def kill():
        while left and not over.is_set():
            mine = psutil.Process().children(recursive=True)
            until = time.monotonic() + 1  # looking for new ones takes long; a call may be short
            while left and time.monotonic() < until:
                for process in mine:
                    with suppress(psutil.Error):
                        if title(process).startswith(f"{WORKER}.{left[0]}"):
                            process.kill()
                            left.pop(0)
                            break
                time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
    assert not left


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_costs_its_calls_and_changes_no_distance(tmp_path, quiet, forget):
    job = changed("search", images=3000, rungs=[1000])
    _, (undisturbed,) = submitted(job, tmp_path, quiet, "undisturbed.db")
    forget()
    with workers_killed("sample"):
        _, (disturbed,) = submitted(job, tmp_path, quiet, "disturbed.db")
    assert [(e.lambdas, e.state, dict(e.rungs)) for e in disturbed] == [
        (e.lambdas, e.state, dict(e.rungs)) for e in undisturbed
    ]


_DRIVER = """
import sys
from pathlib import Path
from search import runner
from search.spec import load
runner._STALE_S = 1.0
runner.submit(load(Path(sys.argv[1])), sys.argv[2])
"""


def test_ctrl_c_cancels_the_job_and_says_how_to_go_on(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(changed("search", images=20_000)))
    url = f"sqlite:///{tmp_path}/store.db"
    words = ["submit", str(tmp_path / "job.yaml"), "--store", url]
    # A shell starts what runs in its background with SIGINT ignored, and so would be what these tests start.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = [sys.executable, "-c", heard + "from search.cli import main; main()", *words]
    driver = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    with open_store(url) as store:
        deadline = time.monotonic() + 120
        while not (store.jobs() and any(e.rungs for e in store.evaluations(1))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(signal.SIGINT)
        _, error = driver.communicate(timeout=60)
        assert driver.returncode == 130
        assert "submit the same job again" in error
        assert (store.job(1).status, store.job(1).error) == ("cancelled", "stopped by Ctrl-C")


def test_a_killed_driver_goes_on_where_it_stopped(tmp_path):
    slow = changed("search", images=4000, rungs=[1000])
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(slow))
    url = f"sqlite:///{tmp_path}/store.db"
    command = [sys.executable, "-c", _DRIVER, str(tmp_path / "job.yaml"), url]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with open_store(url) as store:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            jobs = store.jobs()
            if jobs and [e.state for e in store.evaluations(jobs[0].id)][:2] == ["complete", "running"]:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the second trial never started")
        at_work = sampler_workers(psutil.Process(driver.pid))
        assert {worker.nice() for worker in at_work} == {psutil.Process().nice()}
        children = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGKILL)
        for child in children:  # Ray's own processes of that driver
            child.kill() if child.is_running() else None
        driver.wait()
        before = store.evaluations(jobs[0].id)
        time.sleep(1.5)
        subprocess.run(command, check=True, timeout=200)
        after = store.evaluations(jobs[0].id)
        assert store.job(jobs[0].id).status == "finished"
        assert after[0] == before[0]  # finished evaluations stay as they were
        assert [e.state for e in after].count("failed") == 1
        assert "interrupted" in after[1].error
        assert {e.state for e in after[2:]} == {"complete"}
        assert len({e.lambdas for e in after if e.state == "complete"}) == len(after) - 1  # nothing twice


# --- the adaptive search --------------------------------------------------------------------------------------------

ADAPTIVE = {**JOB, "search": {"images": 400, "confirm": 600, "rungs": [100, 300]}}


def searched(folder, quiet, name="store.db", job=ADAPTIVE, **search):
    """The jobs of an adaptive search, with their evaluations and bests."""
    url = f"sqlite:///{folder}/{name}"
    job = {**job, "search": {**job["search"], **search}}
    jobs, evaluations = submitted(job, folder, quiet, name)
    with open_store(url) as store:
        bests = [store.best(j.model, j.dataset, j.nfe, j.solver) for j in jobs]
    return list(zip(jobs, evaluations, bests, strict=True))


@pytest.mark.usefixtures("local_ray")
def test_an_adaptive_job_spends_little_and_confirms_what_it_found_on_fresh_random_numbers(tmp_path, quiet):
    ((job, tried, best),) = searched(tmp_path, quiet)
    assert (job.strategy, job.status, job.confirm) == ("adaptive", "finished", 600)
    explored = [e for e in tried if e.phase != "confirm"]
    confirmed = [e for e in tried if e.phase == "confirm"]
    assert explored[0].phase == "baseline"
    assert {"b", "k"} <= {e.phase for e in explored}
    assert {e.seed for e in explored} == {0}
    assert all(e.state == ("complete" if e.images == 400 else "pruned") for e in explored)
    assert set(confirmed[0].lambdas) == {1.0}
    assert {e.images for e in confirmed if e.state == "complete"} == {600}
    (fresh,) = {e.seed for e in confirmed}
    assert fresh != 0
    assert len(explored) + len(confirmed) == len(tried)
    assert best.confirmed
    assert best.distance == min(e.distance for e in confirmed if e.state == "complete")
    assert best.baseline_distance == confirmed[0].distance
    assert best.gain == pytest.approx(best.baseline_distance - best.distance)
    assert best.significant  # a Gaussian is far from digits, and larger λ makes its images narrower
    assert best.gain > 5 * best.gain_error > 0
    assert best.gain_error < best.standard_error
    assert best.network_evaluations == sum(e.network_evaluations for e in explored) <= 2.4 * 400 * 5 * 1.5
    assert best.confirm_network_evaluations == 5 * sum(e.images for e in confirmed)


@pytest.mark.usefixtures("local_ray")
def test_an_adaptive_job_gives_the_same_numbers_on_one_and_three_workers(tmp_path, quiet, forget):
    found = []
    for workers in (1, 3):
        forget()
        job = {**ADAPTIVE, "resources": {"workers": workers}}
        ((_, tried, _),) = searched(tmp_path, quiet, f"{workers}.db", job)
        found.append(tried)
    one, three = found
    assert [(e.lambdas, e.phase, e.state, e.seed) for e in one] == [
        (e.lambdas, e.phase, e.state, e.seed) for e in three
    ]
    for mine, theirs in zip(one, three, strict=True):
        assert list(mine.rungs) == list(theirs.rungs)
        assert list(mine.rungs.values()) == pytest.approx(list(theirs.rungs.values()), rel=1e-9)
        assert mine.standard_error == pytest.approx(theirs.standard_error, rel=1e-5)
        assert (mine.gain is None) == (theirs.gain is None)
        if mine.gain is not None:
            assert mine.gain_error == pytest.approx(theirs.gain_error, rel=1e-4, abs=1e-9)
        assert mine.network_evaluations == theirs.network_evaluations > 0


@pytest.mark.usefixtures("local_ray")
def test_a_free_search_bends_the_schedule(tmp_path, quiet):
    job = {**ADAPTIVE, "sampling": {"solver": "ddpm", "nfe": 4}}
    ((_, tried, best),) = searched(
        tmp_path, quiet, job=job, strategy="free", images=200, confirm=200, rungs=[100]
    )
    assert {"baseline", "b", "k", "confirm"} <= {e.phase for e in tried}
    bent = [e for e in tried if e.k is None]
    assert len({e.lambdas for e in bent}) >= 2
    for one in bent:
        assert one.b is None
        line = np.polyval(np.polyfit(range(4), one.lambdas, 1), range(4))
        assert np.abs(one.lambdas - line).max() > 1e-6
    assert len(best.lambdas) == 4
    assert best.confirmed


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("time", "sampling", "parameters"),
    [
        ("discrete", {"solver": "ddim", "nfe": 3, "eta": 0.5}, {"eta": [0, 1]}),
        (
            "sigma",
            {"solver": "heun", "nfe": 5, "S_churn": 5, "S_noise": 1.0},
            {"S_noise": [0.98, 1.02], "S_churn": [0, 10]},
        ),
    ],
)
def test_numbers_of_the_solver_are_searched_beside_lambda(tmp_path, quiet, time, sampling, parameters):
    options = {**JOB["model"]["options"], "time": time}
    job = {**ADAPTIVE, "model": {**JOB["model"], "options": options}, "sampling": sampling}
    ((job, tried, best),) = searched(
        tmp_path, quiet, job=job, images=200, confirm=200, rungs=[100], parameters=parameters
    )
    for name, (low, high) in parameters.items():
        values = {e.parameters[name] for e in tried if name in e.parameters}
        assert len(values) >= 2
        assert all(low <= value <= high for value in values)
        assert sampling[name] not in values  # the job's own value is no change
        assert job.sampling[name] == sampling[name]
    assert set().union(*(e.parameters for e in tried)) == set(parameters)
    assert not tried[0].parameters
    assert set(best.parameters) <= set(parameters)
    changed = [e for e in tried if e.parameters and e.phase in parameters]
    plain = {(e.lambdas, e.seed): e.distance for e in tried if not e.parameters}
    assert any(e.distance != plain[e.lambdas, e.seed] for e in changed if (e.lambdas, e.seed) in plain)


@pytest.mark.usefixtures("local_ray")
def test_a_job_begins_where_a_job_of_another_nfe_ended_and_says_so(tmp_path, quiet):
    ((first, _, found),) = searched(tmp_path, quiet)
    assert first.warm_start is None
    other = {**ADAPTIVE, "sampling": {"solver": "ddpm", "nfe": 8}}
    ((second, tried, _),) = searched(tmp_path, quiet, job=other)
    mean = round(math.fsum(found.lambdas) / 5, 9)
    assert second.warm_start == {"mean": mean, "k": found.k, "nfe": 5, "job": first.id}
    assert set(tried[0].lambdas) == {1.0}
    at = tried[1]  # the start itself: as far from the middle at the ends as it was
    assert at.mean == pytest.approx(mean, abs=1e-9)
    assert {e.phase for e in tried} >= {"baseline", "b", "confirm"}
    ((cold, tried, _),) = searched(tmp_path, quiet, job=other, warm_start=False)
    assert cold.id != second.id
    assert cold.warm_start is None
    assert tried[1].k == 0
    again, _ = submitted({**other, "search": ADAPTIVE["search"]}, tmp_path, quiet)
    assert again[0].id == second.id  # the same question, whatever the store knows by now


@pytest.mark.usefixtures("local_ray")
def test_of_several_nfe_in_one_file_each_begins_where_the_one_before_it_ended(tmp_path, quiet):
    job = {**ADAPTIVE, "sampling": {"solver": "ddpm", "nfe": [5, 8]}}
    (first, _, _), (second, tried, _) = searched(tmp_path, quiet, job=job)
    assert (first.nfe, first.warm_start) == (5, None)
    assert (second.nfe, second.warm_start["job"]) == (8, first.id)
    assert tried[1].mean == pytest.approx(second.warm_start["mean"], abs=1e-9)


@pytest.mark.usefixtures("local_ray")
def test_what_another_job_measured_is_taken_from_the_store_and_what_was_sampled_from_the_cache(
    tmp_path, quiet
):
    search = {"warm_start": False, "rungs": [250], "confirm": 500}
    ((_, first, _),) = searched(tmp_path, quiet, **search)
    # Another budget is another job, which asks the same questions at first.
    ((_, second, _),) = searched(tmp_path, quiet, **search, budget=500)
    reused = [e for e in second if e.reused is not None]
    assert len(reused) >= 5
    known = {e.id: e for e in first}
    for one in reused:
        assert (one.network_evaluations, one.seconds) == (0, 0.0)
        origin = known[one.reused]
        assert (one.key, one.lambdas, one.seed) == (origin.key, origin.lambdas, origin.seed)
        assert one.distance == origin.rungs[one.images]
    # A store that knows nothing takes whole blocks of features from this host: the first 250 images that confirm.
    ((_, third, _),) = searched(tmp_path, quiet, "other.db", **search)
    assert [dict(e.rungs) for e in third] == [dict(e.rungs) for e in first]
    paid = [e.network_evaluations for e in third if e.phase == "confirm" and e.state == "complete"]
    assert len(paid) >= 2
    assert set(paid) == {5 * (500 - 250)}


@pytest.mark.usefixtures("local_ray")
def test_workers_killed_while_they_sample_and_conclude_change_no_distance_and_lose_no_picture(
    tmp_path, quiet, forget
):
    slow = {**ADAPTIVE, "search": {"images": 1000, "confirm": 1000, "rungs": [500]}}
    ((_, undisturbed, _),) = searched(tmp_path, quiet, "undisturbed.db", slow)
    forget()
    with workers_killed("sample", "conclude"):
        ((_, disturbed, _),) = searched(tmp_path, quiet, "disturbed.db", slow)
    assert [(e.lambdas, e.state, dict(e.rungs), e.influence) for e in disturbed] == [
        (e.lambdas, e.state, dict(e.rungs), e.influence) for e in undisturbed
    ]
    with open_store(f"sqlite:///{tmp_path}/disturbed.db") as store:
        pictures = store.pictures(1)
    assert {e.id for e in disturbed if e.phase == "confirm" and e.state == "complete"} <= set(pictures)


@pytest.mark.usefixtures("local_ray")
def test_a_database_that_is_restarted_before_or_after_a_search_is_waited_for(tmp_path, quiet, monkeypatch):
    pytest.importorskip("psycopg")
    if not postgresql_programs():
        pytest.skip("no PostgreSQL programs found")
    killed, restarts = [], []

    def kills(name, call):
        """`call`, whose first statement is the last of a server that is back half a second later."""

        def kill(*_):
            event.remove(Engine, "after_cursor_execute", kill)
            server.kill()
            restarts.append(threading.Timer(0.5, server.start))
            restarts[-1].start()

        def killing(*words, **options):
            if name not in killed:
                killed.append(name)
                event.listen(Engine, "after_cursor_execute", kill)
            return call(*words, **options)

        return killing

    for owner, name in (
        (runner, "_search"),
        (Store, "claim"),
        (runner, "_start"),
        (Store, "set_status"),
        (runner.dashboard, "publish"),
        (runner, "_result"),
    ):
        monkeypatch.setattr(owner, name, kills(name, getattr(owner, name)))
    with postgresql() as server:
        url = server.url.render_as_string(hide_password=False)
        (job,) = runner.submit(parse(JOB, "job.yaml", tmp_path), url, quiet)
        for one in restarts:
            one.join()
    assert job.status == "finished"
    assert killed == ["_search", "claim", "_start", "set_status", "publish", "_result"]
