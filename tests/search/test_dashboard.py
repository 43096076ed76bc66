"""search.dashboard: note, plots and pictures in Optuna's dashboard, in a real browser where there is one."""

import itertools
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._note import get_note
from PIL import Image
from sqlalchemy import Engine, event

from samplers.errors import LamtuneError
from search import dashboard, plots
from storage import open_store

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def published(store, play):
    job = play(store)
    dashboard.publish(store, job.id)
    return job


def test_a_study_gets_its_note_and_every_plot_and_renewing_replaces_them(store, published):
    for _ in range(2):
        storage = store.optuna_storage()
        study = optuna.load_study(study_name=published.study_name, storage=storage)
        note = get_note(study)
        assert note.startswith("# m on d, ddpm, NFE 20\n\nDividing the predicted noise by λ_t = ")
        assert "## Trials" in note
        saved = get_plotly_graph_objects(storage.get_study_system_attrs(study._study_id))
        wanted = {one.key: one for one in plots.of_job(published, store.evaluations(published.id))}
        assert {key: json.loads(text) for key, text in saved.items()} == {
            key: json.loads(json.dumps(dashboard.plotly(one))) for key, one in wanted.items()
        }
        dashboard.publish(store, published.id)


def test_a_database_that_fails_meanwhile_is_a_lamtune_error(store, play, tmp_path):
    job = play(store)

    def limit(connection, _):
        connection.execute("PRAGMA max_page_count = 1")  # what it has, and no more

    event.listen(Engine, "connect", limit)
    try:
        with (
            open_store(f"sqlite:///{tmp_path}/store.db") as again,
            pytest.raises(LamtuneError, match=r"store\.db failed: .*full"),
        ):
            dashboard.publish(again, job.id)
    finally:
        event.remove(Engine, "connect", limit)


def test_a_plots_panels_have_axes_of_their_own_and_all_of_its_points(store, published):
    for plot in plots.of_job(published, store.evaluations(published.id)):
        drawn = dashboard.plotly(plot)
        series = [one for panel in plot.panels for one in panel.series]
        assert [(trace["x"], trace["y"]) for trace in drawn["data"]] == [
            (list(s.x), list(s.y)) for s in series
        ]
        axes = [key for key in drawn["layout"] if key.startswith("xaxis")]
        assert len(axes) == len({trace["xaxis"] for trace in drawn["data"]}) == len(plot.panels)
        places = [[drawn["layout"][axis]["domain"] for axis in (x, x.replace("x", "y", 1))] for x in axes]
        for one, other in itertools.combinations(places, 2):  # apart along x or along y
            assert any(a[1] < b[0] or b[1] < a[0] for a, b in zip(one, other, strict=True))
        shown = [trace["name"] for trace in drawn["data"] if trace["showlegend"]]
        assert len(shown) == len(set(shown))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_plots_the_note_and_the_pictures(store, published, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = "import sys; from search.cli import main; main(['serve', '--port', sys.argv[1], '--store', sys.argv[2]])"
    server = subprocess.Popen(
        [sys.executable, "-c", serve, str(port), store.safe_url], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"{address}/api/health"):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        study = f"{address}/dashboard/studies/1"
        page = _browse(tmp_path, study, "--dump-dom").decode()
        for plot in plots.of_job(published, store.evaluations(published.id)):
            assert f'data-unformatted="{plot.title}"' in page  # drawn, and not only fetched
        assert "Dividing the predicted noise by" in _browse(tmp_path, f"{study}/note", "--dump-dom").decode()
        confirmed = max(store.pictures(published.id))
        (trial,) = [e.number for e in store.evaluations(published.id) if e.id == confirmed]
        _browse(tmp_path, f"{study}/trials?numbers={trial}", f"--screenshot={tmp_path}/shot.png")
        with Image.open(tmp_path / "shot.png") as shot:
            pixels = np.asarray(shot.convert("RGB"))
        assert (pixels == 150).all(axis=2).sum() > 5000  # the grey of the picture
    finally:
        server.terminate()
        server.wait(timeout=20)


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _browse(folder, url, *words):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
        "--window-size=1400,2400", "--virtual-time-budget=20000", *words, url,
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
