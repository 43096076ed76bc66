"""search.pool: what a job gets of one machine or of a cluster's nodes."""

import pytest

from samplers.errors import InputError
from search import pool
from search.pool import Node, available
from search.spec import parse

JOB = {
    "model": {"name": "gauss", "format": "ideal", "options": {"shape": [1, 8, 8]}},
    "dataset": {"name": "digits", "reference": "digits"},
    "features": "digits",
    "sampling": {"solver": "heun", "nfe": 5},
}


def asked(tmp_path, **resources):
    return parse({**JOB, "resources": resources}, "job.yaml", tmp_path)


def machine(cores, gpus=0):
    return [Node("here", {"CPU": cores, "GPU": gpus}, {})]


CLUSTER = [
    Node("head", {"node:__internal_head__": 1.0}, {}, "1"),
    Node("old", {"CPU": 8.0, "GPU": 2.0}, {"card": "v100"}, "2"),
    Node("new", {"CPU": 16.0, "GPU": 4.0, "big": 2.0}, {"card": "h100"}, "3"),
    Node("cores", {"CPU": 64.0}, {}, "4"),
]
CORES = [Node("a", {"CPU": 4.0}, {}, "1"), Node("b", {"CPU": 3.0}, {}, "2")]


@pytest.mark.parametrize(
    ("nodes", "resources", "expected"),
    [
        (machine(8), {}, ("cpu", 8, 1, 1, 0)),
        (machine(8), {"workers": 2}, ("cpu", 2, 4, 4, 0)),
        (machine(2), {"workers": 3}, ("cpu", 3, 1, 1, 0)),
        (machine(8), {"cpus": 3}, ("cpu", 2, 3, 3, 0)),
        (machine(8, 4), {}, ("cuda", 4, 1, 0, 1)),
        (machine(8, 1), {}, ("cuda", 1, 4, 0, 1)),
        (machine(8, 2), {"gpus": 0.5}, ("cuda", 4, 1, 0, 0.5)),
        (machine(8, 2), {"gpus": 0.3, "workers": 6}, ("cuda", 6, 1, 0, 0.3)),
        (machine(8, 2), {"gpus": 0}, ("cpu", 8, 1, 1, 0)),
        (CORES, {}, ("cpu", 7, 1, 1, 0)),
        (CORES, {"cpus": 2}, ("cpu", 3, 2, 2, 0)),
        (CORES, {"workers": 100}, ("cpu", 100, 1, 1, 0)),
        (CLUSTER, {}, ("cuda", 6, 1, 0, 1)),
        (CLUSTER, {"gpus": 0.5, "cpus": 4}, ("cuda", 6, 4, 4, 0.5)),
        (CLUSTER, {"labels": {"card": "h100"}}, ("cuda", 4, 3, 0, 1)),
        (CLUSTER, {"custom": {"big": 1}}, ("cuda", 2, 5, 0, 1)),
    ],
)
def test_a_job_gets_what_there_is_room_for(nodes, resources, expected, tmp_path):
    found = available(asked(tmp_path, **resources), nodes)
    needs = found.needs
    assert (found.device, found.workers, found.threads, needs["CPU"], needs["GPU"]) == expected
    assert {**needs, **resources.get("custom", {})} == needs
    assert found.labels == resources.get("labels", {})


@pytest.mark.parametrize(
    ("nodes", "resources", "message"),
    [
        (machine(8, 2), {"workers": 3}, "resources.workers: 3 were asked for.*this machine has 2 GPU"),
        (
            machine(8, 2),
            {"gpus": 0.5, "workers": 5},
            "5 were asked for, each with 0.5.*this machine has 2 GPU",
        ),
        (machine(8), {"gpus": 1}, "this machine has 0 GPU"),
        (machine(8), {"labels": {"card": "h100"}}, "resources.labels: no node has.*h100.*here with CPU: 8"),
        (machine(8), {"custom": {"big": 1}}, "resources.custom: no node has.*big"),
        (CLUSTER, {"custom": {"big": 3}}, "resources.custom: no node has.*new with CPU: 16, GPU: 4, big: 2"),
        (CORES, {"gpus": 1}, "no node has room: name a number of workers"),
        (CORES, {"cpus": 5}, "no node has room"),
    ],
)
def test_what_no_node_can_give_is_named(nodes, resources, message, tmp_path):
    with pytest.raises(InputError, match=message):
        available(asked(tmp_path, **resources), nodes)


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus": 2}, "resources.gpus"),
        ({"gpus": -1}, "resources.gpus"),
        ({"cpus": 0}, "resources.cpus"),
        ({"custom": {"GPU": 1}}, "resources.custom: GPU: write cpus and gpus instead"),
        ({"custom": {"big": 0}}, "resources.custom.big"),
        ({"labels": {"card": "!h100"}}, "resources.labels.card"),
    ],
)
def test_resources_that_mean_nothing_name_their_key(resources, message, tmp_path):
    with pytest.raises(InputError, match=message):
        asked(tmp_path, **resources)


def test_a_file_is_missing_or_differs_by_its_size(tmp_path):
    (tmp_path / "same").write_text("12")
    (tmp_path / "longer").write_text("123")
    here = {
        "model.path": (str(tmp_path / "absent"), 2),
        "model.options.weights": (str(tmp_path / "same"), 2),
        "features": (str(tmp_path / "longer"), 2),
        "dataset.reference": (str(tmp_path), None),
    }
    assert pool._unseen(here) == [
        f"model.path: {tmp_path}/absent: no such file or folder",
        f"features: {tmp_path}/longer: 3 bytes, and 2 where the job was started",
    ]


def test_the_files_of_a_job_are_the_texts_in_it_that_name_one(tmp_path):
    for name in ("net.py", "weights.pt", "stats.npz", "features.ts", "gauss", "digits"):
        (tmp_path / name).write_text("x")
    model = {"name": "gauss", "format": "python", "path": "net.py:make"}
    model["options"] = {"weights": "weights.pt", "shape": [1, 8, 8], "note": ""}
    job = {
        **JOB,
        "model": model,
        "dataset": {"name": "digits", "reference": "stats.npz"},
        "features": "features.ts",
    }
    assert parse(job, "job.yaml", tmp_path).files == {
        "model.path": tmp_path / "net.py",
        "model.options.weights": tmp_path / "weights.pt",
        "dataset.reference": tmp_path / "stats.npz",
        "features": tmp_path / "features.ts",
    }
