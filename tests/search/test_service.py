"""search.service: what it answers, what it refuses, and that it tells nothing to those without the token."""

import base64
import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import schemathesis
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data, one_of
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from benchmarks.jobs import new_job
from samplers.errors import InputError
from samplers.schedule import Schedule
from search.cli import main
from search.report import best_as_dict
from search.service import create_app, is_loopback, token_for
from storage import Evaluator, open_store

TOKEN = "a token of 𝒹𝑒𝑒𝓅 secrets"
LOCAL = "http://127.0.0.1:8080"
INFLUENCE = b"\xff\xfe\x00\x80"  # no text in any encoding


def add_job(store, model="adm", **distances):
    """A finished job of NFE 2 with an evaluation per b."""
    job = store.create_job(
        new_job(
            study_name=f"{model}-{len(store.jobs())}",
            model=model,
            dataset="cifar10",
            sampling={"clip": True},
            nfe=2,
            images=100,
            spec={"model": {"name": model}},
            evaluator=Evaluator(fingerprint="e", features="digits", dimension=8, reference="r", details={}),
        )
    )
    for number, (b, distance) in enumerate(distances.items()):
        started = store.start_evaluation(job.id, number, "coarse", Schedule.uniform(2, float(b[1:]) / 100))
        store.report_rung(started.id, images=50, distance=distance + 1, network_evaluations=100, seconds=1.0)
        store.report_rung(
            started.id,
            images=100,
            distance=distance,
            network_evaluations=200,
            seconds=2.0,
            influence=INFLUENCE,
        )
        store.finish_evaluation(started.id)
    return store.set_status(job.id, "finished")


@pytest.fixture
def store(url):
    with open_store(url) as opened:
        add_job(opened, b100=3.0, b102=2.0, b104=2.5)
        yield opened


@pytest.fixture
def client(store):
    return TestClient(create_app(store, None), base_url=LOCAL)


def basic(password, user="anybody"):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def bearer(token):
    return {"Authorization": b"Bearer " + token.encode()}


# --- answers ------------------------------------------------------------------------------------------------


def test_best_is_what_the_command_line_gives(client, store):
    answer = client.get("/api/best", params={"model": "adm", "dataset": "cifar10", "nfe": 2})
    assert answer.status_code == 200
    known = store.best(model="adm", dataset="cifar10", nfe=2)
    assert answer.json() == json.loads(json.dumps(best_as_dict(known)))
    assert (answer.json()["b"], answer.json()["baseline_distance"]) == (1.02, 3.0)


def test_best_of_what_is_not_there_is_404_and_says_what_is(client):
    answer = client.get(
        "/api/best", params={"model": "adn", "dataset": "cifar10", "nfe": 2, "solver": "ddpm"}
    )
    assert answer.status_code == 404
    assert "model adm, dataset cifar10, solver ddpm, NFE 2" in answer.json()["detail"]


def test_jobs_page_backwards_through_all_of_them(client, store):
    ids = [job.id for job in store.jobs()] + [add_job(store, model).id for model in ("x", "y", "x", "z")]
    seen = []
    while True:
        params = {"limit": 2} | ({"before_id": seen[-1]} if seen else {})
        page = client.get("/api/jobs", params=params).json()
        assert len(page) <= 2
        if not page:
            break
        seen += [job["id"] for job in page]
    assert seen == sorted(ids, reverse=True)
    assert [job["model"] for job in client.get("/api/jobs", params={"model": "x"}).json()] == ["x", "x"]
    assert client.get("/api/jobs", params={"status": "running"}).json() == []


def test_a_job_comes_with_its_evaluations(client, store):
    (job,) = store.jobs()
    answer = client.get(f"/api/jobs/{job.id}").json()
    assert answer["job"]["evaluator"] == dataclasses.asdict(job.evaluator)
    assert [(e["b"], e["distance"], e["rungs"]) for e in answer["evaluations"]] == [
        (1.0, 3.0, {"50": 4.0, "100": 3.0}),
        (1.02, 2.0, {"50": 3.0, "100": 2.0}),
        (1.04, 2.5, {"50": 3.5, "100": 2.5}),
    ]
    assert [base64.urlsafe_b64decode(e["influence"]) for e in answer["evaluations"]] == [INFLUENCE] * 3
    assert client.get(f"/api/jobs/{job.id + 1}").status_code == 404


def test_the_evaluations_of_a_job_page_forwards_through_all_of_them(client, store):
    (job,) = store.jobs()
    pages = []
    while not pages or pages[-1]:
        after = {"after_number": pages[-1][-1]} if pages else {}
        answer = client.get(f"/api/jobs/{job.id}", params={"limit": 2} | after).json()
        assert answer["job"]["id"] == job.id
        pages.append([one["number"] for one in answer["evaluations"]])
    assert pages == [[0, 1], [2], []]
    for wrong in ("limit=0", "limit=501", "after_number=-1", f"after_number={2**31}"):
        assert client.get(f"/api/jobs/{job.id}?{wrong}").status_code == 422


def test_a_page_has_fifty_evaluations_unless_asked_for_another_number(client, store):
    job = add_job(store, "long", **{f"b{100 + n}": 3.0 for n in range(60)})
    assert len(client.get(f"/api/jobs/{job.id}").json()["evaluations"]) == 50
    assert len(client.get(f"/api/jobs/{job.id}?limit=500").json()["evaluations"]) == 60


@pytest.mark.parametrize(
    "query",
    ["nfe=0", f"nfe={2**31}", "nfe=2&model=", "nfe=2&model=a%00b", "nfe=2&model=" + "m" * 201, "nfe=x"],
)
def test_what_no_database_can_hold_is_422(client, query):
    assert client.get(f"/api/best?dataset=d&model=m&{query}").status_code == 422


def test_a_parameter_that_is_given_twice_is_422_and_named(client):
    answer = client.get("/api/jobs?limit=2&limit=3")
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", "limit"])


def test_a_database_that_fails_is_503_without_its_password(postgresql_url):
    with open_store(postgresql_url) as opened:
        client = TestClient(create_app(opened, None), base_url=LOCAL)
        with opened._writers.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE lamtune_jobs RENAME TO elsewhere")
        answer = client.get("/api/jobs")
        assert answer.status_code == 503
        assert "elsewhere" not in answer.text
        assert opened._url.password not in answer.text
        assert client.get("/api/health").json() == {"status": "ok"}


def test_the_dashboard_has_all_other_paths(client):
    assert client.get("/", follow_redirects=False).headers["location"].endswith("/dashboard")
    page = client.get("/dashboard")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/static/bundle.js").status_code == 200
    assert client.get("/api/studies").json() == {"study_summaries": []}
    assert client.get("/api/nothing").status_code == 404


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    with open_store(f"sqlite:///{tmp_path_factory.mktemp('local')}/s.db") as opened:
        yield TestClient(create_app(opened, None), base_url=LOCAL)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"])
@pytest.mark.parametrize("path", ["/api/studies", "/api/studies/1", "/api/best", "/api/health", "/dashboard"])
def test_nothing_can_be_changed_through_it(local, method, path):
    answer = local.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


PATHS = [
    "/api/best?model=adm&dataset=cifar10&nfe=2",
    "/api/jobs",
    "/api/jobs/1",
    "/api/jobs/99",
    "/api/openapi.json",
    "/api/studies",
    "/api/nothing",
    "/api/health/",
    "/",
    "/dashboard",
    "/static/bundle.js",
    "/favicon.ico",
    "/docs",
    "//api/health",
    "/%61pi/jobs",
]
STRANGERS = {
    "nothing": {},
    "another token": bearer("a token of other secrets"),
    "the start of the token": bearer(TOKEN[:-1]),
    "an empty one": bearer(""),
    "another password": basic("wrong"),
    "the token as the user": basic("", TOKEN),
    "no base64": {"Authorization": "Basic ????"},
    "another scheme": {"Authorization": b"Digest " + TOKEN.encode()},
    "the token alone": {"Authorization": TOKEN.encode()},
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with open_store(f"sqlite:///{tmp_path_factory.mktemp('guarded')}/s.db") as opened:
        add_job(opened, b100=3.0)
        yield TestClient(create_app(opened, TOKEN), base_url="http://team.example")


@pytest.mark.parametrize("stranger", STRANGERS)
def test_who_has_no_token_gets_401_and_learns_nothing(guarded, stranger):
    def seen(answer):
        return answer.status_code, answer.content, sorted(answer.headers.multi_items())

    headers = STRANGERS[stranger]
    answers = [guarded.get(path, headers=headers, follow_redirects=False) for path in PATHS]
    answers += [
        guarded.request(method, "/api/studies/1", headers=headers) for method in ("POST", "DELETE", "FOO")
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert all(seen(answer) == seen(answers[0]) for answer in answers)
    assert answers[0].headers["www-authenticate"].startswith("Basic ")
    assert guarded.get("/api/health", headers=headers).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "headers", [bearer(TOKEN), basic(TOKEN), basic(TOKEN, ""), basic(TOKEN, "some body")]
)
@pytest.mark.parametrize("path", ["/api/jobs", "/dashboard", "/api/studies", "/api/openapi.json"])
def test_a_program_brings_the_token_and_a_browser_any_user_with_it_as_the_password(guarded, headers, path):
    assert guarded.get(path, headers=headers).status_code == 200


def test_a_head_is_a_get(guarded):
    assert guarded.head("/api/jobs").status_code == 401
    answer = guarded.head("/api/jobs", headers=bearer(TOKEN))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("127.0.0.1", 200),
        ("localhost:9", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("[::1]", 200),
        ("evil.example:8080", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("192.168.0.7:8080", 421),
        ("", 421),
    ],
)
def test_without_a_token_only_requests_to_loopback_names_are_answered(local, host, status):
    for path in ("/api/jobs", "/dashboard", "/api/health"):
        assert local.get(path, headers={"Host": host}).status_code == status


def test_every_answer_tells_browsers_to_keep_it_to_themselves(guarded):
    asked = {"Origin": "https://evil.example", **bearer(TOKEN)}
    for path in ("/api/jobs", "/api/health", "/dashboard", "/api/nothing", "/api/best"):
        headers = guarded.get(path, headers=asked).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert headers["cache-control"].startswith("private")
        assert "default-src" in headers["content-security-policy"]
        assert not [name for name in headers if name.startswith("access-control")]


# --- starting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    assert is_loopback(host)
    assert token_for(host, None, None) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "team.example", ""])
def test_listening_beyond_loopback_needs_one(host):
    with pytest.raises(InputError, match="--token-file FILE or set LAMTUNE_TOKEN"):
        token_for(host, None, None)
    assert token_for(host, None, TOKEN) == TOKEN


def test_a_token_is_read_from_its_file_first(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert token_for("0.0.0.0", tmp_path / "token", "another token, long enough") == TOKEN


@pytest.mark.parametrize("content", [b"", b"\n", b"short", b"\xff" * 20])
def test_a_useless_token_is_refused_without_showing_it(tmp_path, content):
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"--token-file {file}") as caught:
        token_for("127.0.0.1", file, None)
    assert "short" not in str(caught.value)
    with pytest.raises(InputError, match="LAMTUNE_TOKEN"):
        token_for("127.0.0.1", None, "short")
    with pytest.raises(InputError, match="No such file"):
        token_for("127.0.0.1", tmp_path / "absent", TOKEN)


def test_the_command_does_not_start_beyond_loopback_without_a_token(tmp_path):
    words = ["serve", "--host", "0.0.0.0", "--store", f"sqlite:///{tmp_path}/s.db"]
    result = CliRunner(env={"LAMTUNE_TOKEN": None}).invoke(main, words)
    assert result.exit_code == 2
    assert "a token is needed" in result.output


def test_the_command_serves_with_a_token_that_no_output_shows(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "token").write_text(TOKEN)
    words = ["serve", "--port", str(port), "--token-file", str(tmp_path / "token")]
    program = [sys.executable, "-c", "from search.cli import main; main()", *words]
    store = ["--store", f"sqlite:///{tmp_path}/s.db"]
    server = subprocess.Popen([*program, *store], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port}  (Ctrl-C ends it)\n"
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs", headers=basic(TOKEN))
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    assert json.load(answer) == []
                    assert "server" not in answer.headers
                break
            except urllib.error.URLError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs?token={TOKEN.split()[0]}", timeout=5)
    finally:
        server.terminate()
        output, _ = server.communicate(timeout=30)
    assert TOKEN not in output
    assert "Traceback" not in output


# --- its own OpenAPI ----------------------------------------------------------------------------------------


def test_the_api_describes_its_paths_and_schemes(guarded):
    document = guarded.get("/api/openapi.json", headers=bearer(TOKEN)).json()
    assert set(document["paths"]) == {"/api/best", "/api/jobs", "/api/jobs/{job_id}", "/api/health"}
    assert all(set(path) == {"get"} for path in document["paths"].values())
    assert {scheme["scheme"] for scheme in document["components"]["securitySchemes"].values()} == {
        "basic",
        "bearer",
    }
    assert "security" not in document["paths"]["/api/health"]["get"]
    pages = {"/api/jobs": {"limit", "before_id"}, "/api/jobs/{job_id}": {"limit", "after_number"}}
    for path, names in pages.items():
        assert names <= {parameter["name"] for parameter in document["paths"][path]["get"]["parameters"]}
    assert "distance" in document["components"]["schemas"]["Best"]["required"]


def test_random_requests_are_answered_as_the_api_describes(store):
    """Schemathesis: documented statuses, types and schemas, no 5xx, 401 without the token."""
    app = create_app(store, TOKEN)
    headers = {"Authorization": bearer(TOKEN)["Authorization"].decode("latin-1")}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers=headers)
    seen = set()

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data())
    def check(operation, drawn):
        kinds = [
            operation.as_strategy(mode) for mode in GenerationMode if operation.query or mode.is_positive
        ]
        response = drawn.draw(one_of(kinds)).call_and_validate(headers=headers)
        seen.add((operation.path, response.status_code))

    for result in schema.get_all_operations():
        check(result.ok())
    assert seen >= {
        ("/api/best", 404),
        ("/api/best", 422),
        ("/api/jobs", 200),
        ("/api/jobs", 422),
        ("/api/jobs/{job_id}", 404),
        ("/api/health", 200),
    }
