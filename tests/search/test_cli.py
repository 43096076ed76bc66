"""search.cli: the words, exit codes and JSON keys that others build on."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sqlalchemy import Engine, create_engine, event, make_url

from search.cli import main
from search.spec import load
from storage import open_store

GAUSS = "format: ideal, options: {time: discrete, shape: [1, 8, 8], mean: 0.1, std: 0.4}"
JOB = """\
model: {{name: gauss, format: ideal, options: {{time: discrete, shape: [1, 8, 8], mean: 0.1, std: 0.4}}}}
dataset: {{name: digits, reference: digits}}
features: digits
sampling: {{solver: ddpm, nfe: {nfe}}}
search: {{strategy: paper, images: 64, confirm: 0, b: {{coarse: 0.1, fine: 0.05}}, k: {{start: 0, stop: 0}}}}
resources: {{workers: 1}}
"""


def run(*words, **environment):
    return CliRunner(env=environment).invoke(main, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def submitted(tmp_path, url, local_ray):
    (tmp_path / "job.yaml").write_text(JOB.format(nfe=5))
    result = run("submit", tmp_path / "job.yaml", "--store", url)
    assert result.exit_code == 0, result.output
    return result


def test_submit_prints_each_trial_and_the_answer(submitted):
    lines = submitted.output.splitlines()
    assert lines[0].startswith("job 1: gauss on digits, ddpm, NFE 5, 64 images a trial")
    assert any("baseline" in line for line in lines)
    assert any("λ = 1 gives" in line for line in lines)


def test_best_and_jobs_answer_in_the_agreed_words(submitted, url):
    answer = json.loads(
        run("best", "--model", "gauss", "--dataset", "digits", "--nfe", 5, "--json", "--store", url).output
    )
    keys = [
        "model",
        "dataset",
        "solver",
        "nfe",
        "k",
        "b",
        "lambdas",
        "distance",
        "standard_error",
        "baseline_distance",
        "gain",
        "gain_error",
        "significant",
        "confirmed",
        "images",
        "trials",
        "status",
    ]
    assert list(answer)[: len(keys)] == keys
    assert (answer["model"], answer["solver"], answer["nfe"], answer["status"]) == (
        "gauss",
        "ddpm",
        5,
        "finished",
    )
    assert answer["images"] == 64
    assert answer["lambdas"] == pytest.approx([answer["k"] * t + answer["b"] for t in range(5)])
    assert answer["distance"] <= answer["baseline_distance"]
    assert answer["gain"] == pytest.approx(answer["baseline_distance"] - answer["distance"])
    assert answer["significant"] == (answer["gain"] > 2 * answer["gain_error"])
    assert not answer["confirmed"]
    with open_store(url) as store:
        evaluations = store.evaluations(1)
    assert answer["trials"] == len(evaluations)
    assert answer["distance"] == min(e.distance for e in evaluations)
    (job,) = json.loads(run("jobs", "--json", LAMTUNE_STORE=url).output)
    assert job == {
        "id": 1,
        "model": "gauss",
        "dataset": "digits",
        "solver": "ddpm",
        "nfe": 5,
        "status": "finished",
    }
    assert "gauss" in run("jobs", "--store", url).output
    text = run(
        "best", "--model", "gauss", "--dataset", "digits", "--nfe", 5, "--solver", "ddpm", "--store", url
    ).output
    assert f"{answer['distance']:.4f}" in text


def test_jobs_come_by_pages(submitted, url, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB.format(nfe="[3, 4]"))
    assert run("submit", tmp_path / "job.yaml", "--store", url).exit_code == 0
    page = run("jobs", "--limit", 2, "--store", url)
    assert page.output.splitlines()[-1] == "older ones: lamtune jobs --before 2"
    assert [job["id"] for job in json.loads(run("jobs", "--limit", 2, "--json", "--store", url).output)] == [
        3,
        2,
    ]
    rest = run("jobs", "--limit", 2, "--before", 2, "--store", url).output.splitlines()
    assert [line.split()[0] for line in rest] == ["id", "1"]
    assert run("jobs", "--before", 1, "--store", url).output == "no job is older than 1\n"


def test_an_unknown_model_exits_1_and_says_what_the_store_has(submitted, url):
    result = run("best", "--model", "gaus", "--dataset", "digits", "--nfe", 5, "--store", url)
    assert result.exit_code == 1
    assert "model gauss, dataset digits, solver ddpm, NFE 5" in result.output


def test_the_dashboard_serves_the_study_of_the_store(submitted, url):
    words = [
        sys.executable,
        "-c",
        "from search.cli import main; main()",
        "dashboard",
        "--port",
        "18765",
        "--store",
        url,
    ]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen("http://127.0.0.1:18765/api/studies", timeout=5) as answer:
                    studies = json.load(answer)["study_summaries"]
                break
            except urllib.error.URLError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        server.terminate()
        server.wait()
    assert [s["study_name"].rpartition("--")[0] for s in studies] == ["gauss--digits--ddpm-5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("features:", "feature:"), "feature: unknown key"),
        (("nfe: 5", "nfe: 0"), "nfe"),
        ((GAUSS, "format: adm, path: absent.pt"), "absent.pt"),
        (("images: 64", "images: 1"), "search.images"),
        (("ddpm", "heun"), "heun"),
        (("coarse: 0.1", "coarse: .nan"), "b.coarse"),
        (("fine: 0.05", "start: -1"), "search.b.start is -1.0: it must be above 0"),
        (("reference: digits", "reference: absent.npz"), "absent.npz"),
    ],
)
def test_bad_input_exits_2_and_names_the_key_or_file(change, message, tmp_path, url):
    (tmp_path / "job.yaml").write_text(JOB.format(nfe=5).replace(*change))
    result = run("submit", tmp_path / "job.yaml", "--store", url)
    assert result.exit_code == 2
    assert message in result.output


def test_flags_that_do_not_fit_a_checkpoint_are_named_with_the_ones_that_would(shared, tmp_path, url):
    path = shared / "reference" / "vectors" / "checkpoints" / "adm-uncond.pt"
    job = JOB.format(nfe=5).replace("format: ideal", f"format: adm, path: {path}")
    job = job.replace(
        "options: {time: discrete, shape: [1, 8, 8], mean: 0.1, std: 0.4}", "options: {image_size: 32}"
    )
    (tmp_path / "job.yaml").write_text(job)
    result = run("submit", tmp_path / "job.yaml", "--store", url)
    assert result.exit_code == 2
    assert "num_channels" in result.output


def test_a_store_that_cannot_be_opened_exits_2_without_its_password(tmp_path):
    for words in (("jobs",), ("best", "--model", "m", "--dataset", "d", "--nfe", 5)):
        result = run(*words, "--store", "postgresql://me:geheim@127.0.0.1:1/none")
        assert result.exit_code == 2
        assert "cannot be opened" in result.output
        assert "geheim" not in result.output
    assert run("jobs", "--store", f"sqlite:///{tmp_path}/no/folder/s.db").exit_code == 2


def test_a_wrong_password_exits_2_and_is_not_shown(postgresql_url):
    wrong = make_url(postgresql_url).set(password="geheim").render_as_string(hide_password=False)
    for words in (["jobs"], ["cancel", "1"], ["resume", "1"], ["store", "check"]):
        result = run(*words, "--store", wrong)
        assert result.exit_code == 2
        assert "password authentication failed" in result.output
        assert "geheim" not in result.output


def full(url):
    """Nothing more fits into a SQLite file than some pages; call the result to have room again."""
    with open_store(url) as store:
        store.optuna_storage()
    connection = sqlite3.connect(make_url(url).database)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.close()

    def limit(connection, _):
        connection.execute(f"PRAGMA max_page_count = {pages + 3}")

    event.listen(Engine, "connect", limit)
    return lambda: event.remove(Engine, "connect", limit)


def read_only(url):
    """A PostgreSQL database can only be read once the first trial has ended; call the result to write again."""
    ours = {"options": "-c default_transaction_read_only=off"}
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), connect_args=ours)

    def switch(to):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(
                f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = {to}"
            )
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    def wait():
        with open_store(url) as store:
            while not any(e.state == "complete" for job in store.jobs() for e in store.evaluations(job.id)):
                time.sleep(0.02)
        switch("on")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()

    def undo():
        waiting.join(timeout=60)
        switch("off")
        engine.dispose()

    return undo


@pytest.mark.usefixtures("local_ray", "forget")
@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [("sqlite", full, "database or disk is full"), ("postgresql", read_only, "read-only transaction")],
)
def test_a_database_that_takes_no_more_ends_the_job_with_1_and_loses_nothing(
    kind, spoil, message, request, tmp_path, monkeypatch
):
    url = request.getfixturevalue(f"{kind}_url")
    monkeypatch.setattr(
        "search.runner._STALE_S", -1.0
    )  # who could not say that it ended holds the job for a while
    job = JOB.format(nfe=5).replace("images: 64", "images: 4000, rungs: [1000]")
    (tmp_path / "job.yaml").write_text(job)
    mend = spoil(url)
    try:
        result = run("submit", tmp_path / "job.yaml", "--store", url)
    finally:
        mend()
    assert result.exit_code == 1
    assert message in result.output
    with open_store(url) as store:
        before = {e.number: e for e in store.evaluations(1) if e.state == "complete"}
        assert run("submit", tmp_path / "job.yaml", "--store", url).exit_code == 0
        after = {e.number: e for e in store.evaluations(1)}
        assert store.job(1).status == "finished"
    assert before.items() <= after.items()
    assert 0 < len(before) < len([e for e in after.values() if e.state == "complete"])


@pytest.mark.usefixtures("local_ray")
def test_a_job_may_come_from_the_standard_input_with_its_folder(tmp_path, url):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    np.savez(folder / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    job = JOB.format(nfe=3).replace("reference: digits", "reference: stats.npz")
    words = ["submit", "-", "--folder", str(folder), "--store", url]
    result = CliRunner().invoke(main, words, input=job, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with open_store(url) as store:
        assert store.job(1).spec["dataset"]["reference"] == str(folder / "stats.npz")


def test_status_shows_how_a_job_is(submitted, url):
    text = run("status", 1, "--store", url).output.splitlines()
    with open_store(url) as store:
        best, tried = store.best(model="gauss", dataset="digits", nfe=5), store.evaluations(1)
    assert text[:2] == ["job 1: gauss on digits, ddpm, NFE 5: finished", f"  trials: {len(tried)} complete"]
    assert text[2].startswith(f"  lowest Fréchet distance {best.distance:.4f} in trial {best.number}, b ")
    missing = run("status", 9, "--store", url)
    assert (missing.exit_code, "has no job 9" in missing.output) == (1, True)


def test_resume_needs_the_number_only(submitted, url, tmp_path):
    (tmp_path / "job.yaml").unlink()
    with open_store(url) as store:
        store.set_status(1, "cancelled")
        before = store.evaluations(1)
        result = run("resume", 1, "--store", url)
        assert result.exit_code == 0, result.output
        assert "gauss on digits, ddpm, NFE 5 (job 1, finished)" in result.output
        assert store.evaluations(1) == before
    missing = run("resume", 9, "--store", url)
    assert (missing.exit_code, "has no job 9" in missing.output) == (1, True)
    alone = run("resume", 1, "--cluster", "auto")
    assert (alone.exit_code, "set LAMTUNE_STORE where the cluster runs" in alone.output) == (2, True)


def test_store_check_and_upgrade_say_how_the_tables_are(url):
    absent = run("store", "check", "--store", url)
    assert (absent.exit_code, "does not exist yet" in absent.output) == (1, True)
    upgraded = run("store", "upgrade", "--store", url)
    assert (upgraded.exit_code, upgraded.output[:15]) == (0, "schema version ")
    checked = run("store", "check", LAMTUNE_STORE=url)
    assert (checked.exit_code, checked.output) == (0, upgraded.output.replace("\n", ", up to date\n"))


def test_reference_writes_statistics_that_a_job_can_use(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    result = run("reference", tmp_path / "images", "-o", tmp_path / "stats.npz", "--features", "digits")
    assert result.exit_code == 0, result.output
    assert "12 images, 64 features" in result.output
    with np.load(tmp_path / "stats.npz") as stats:
        assert stats["mu"].shape == (64,)
        assert stats["sigma"].shape == (64, 64)
    empty = run("reference", tmp_path / "absent", "-o", tmp_path / "x.npz", "--features", "digits")
    assert empty.exit_code == 2
    assert "absent" in empty.output


def test_export_writes_what_the_search_found(submitted, url, tmp_path):
    words = ("export", "--model", "gauss", "--dataset", "digits", "--nfe", 5, "--store", url)
    found = json.loads(run("best", *words[1:], "--json").output)
    result = run(*words, "--job", tmp_path / "job.yaml", "-o", tmp_path / "best.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    assert written["lambdas"] == found["lambdas"]
    assert [step["timestep"] for step in written["steps"]] == [0, 250, 500, 749, 999]
    uniform = run(*words, "--format", "adm-es")
    assert f"--eps_scaler {found['b']}" in uniform.output
    heavy = "{'torch', 'ray', 'optuna', 'numpy'} & set(sys.modules)"
    program = "import sys; from search.cli import main; main(sys.argv[1:], standalone_mode=False)"
    script = f"{program}; sys.exit({heavy} or 0)"
    light = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True)
    assert light.returncode == 0, light.stderr
    assert json.loads(light.stdout)["lambdas"] == found["lambdas"]
    refused = run(*words, "--format", "edm-es")
    assert refused.exit_code == 2
    assert "EDM-ES has no ddpm" in refused.output
    assert run(*words, "-o", tmp_path / "no" / "folder.json").exit_code == 2


def test_the_demo_is_the_usual_search_confirmed_on_ten_thousand_images():
    from search import cli

    spec = load(cli.DEMO)
    assert spec.search.strategy == "adaptive"
    assert spec.search.images == spec.search.confirm_images == 10_000
    assert len(spec.sampling) == 1


@pytest.mark.parametrize(
    "words", [["--help"], ["submit", "--help"], ["jobs", "--store", "sqlite:///{}/s.db"]]
)
def test_light_commands_import_neither_torch_nor_ray_nor_optuna(words, tmp_path):
    script = (
        "import sys\n"
        "from search.cli import main\n"
        f"main({[w.format(tmp_path) for w in words]!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'optuna', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_report_writes_every_format_and_its_plots_and_watch_ends_with_the_job(submitted, tmp_path, url):
    for suffix, begins in (("html", "<!doctype html>"), ("md", "# gauss on digits"), ("csv", "model,")):
        file = tmp_path / f"report.{suffix}"
        words = ("report", 1, "-o", file, "--plots", tmp_path / "plots", "--dashboard", "--store", url)
        assert run(*words).exit_code == 0
        assert file.read_text().startswith(begins)
    assert (tmp_path / "plots" / "cost.svg").exists()
    assert "](plots/cost.svg)" in (tmp_path / "report.md").read_text()
    named = run("report", "--model", "gauss", "--dataset", "digits", "--nfe", 5, "--store", url)
    assert named.output == run("report", 1, "--store", url).output
    assert run("report", "--store", url).exit_code == 2
    assert run("report", 1, "-o", tmp_path / "report.txt", "--store", url).exit_code == 2
    watched = run("watch", 1, "--store", url)
    assert watched.exit_code == 0
    assert watched.output.startswith("job 1 finished")
