"""Connects to Ray, and starts and ends the sampler workers: as many actors as there is room for; they outlive trials.

Room is on this machine, or on a Ray cluster that several jobs share. Knows nothing of trials, strategies or the store.
"""

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from objectives.reference import Reference
from samplers.errors import InputError, LamtuneError
from search import blocks
from search.evaluator import BLOCK
from search.spec import JobSpec
from search.tuner import Workers
from search.worker import SamplerWorker

# Images per call to a worker: enough that it costs nothing beside its work, few enough that a lost one is no loss.
_UNIT = {"cuda": 8 * BLOCK, "cpu": 2 * BLOCK}
_RESTARTS = 20  # how often a worker is started again that died, or lost its node


@dataclass(frozen=True, slots=True)
class Node:
    """A machine: Ray's resources (CPU, GPU, …) and labels. `id`: of Ray's node, None for this machine without Ray."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    id: str | None = None

    def room(self, each: Mapping[str, float]) -> int:
        """How many workers fit that need `each` of the resources."""
        rooms = (math.floor(self.resources.get(name, 0) / need + 1e-9) for name, need in each.items() if need)
        return min(rooms, default=0)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a job gets: `workers` processes on `device`, each with `threads`, and what Ray sets aside for each.

    `needs`: Ray's resources of one worker. `labels`: of the nodes that it may run on.
    """

    device: str
    workers: int
    threads: int
    needs: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def unit(self) -> int:
        """Images per call to a worker."""
        return _UNIT[self.device]


@contextmanager
def connected(address: Literal["local", "auto"]) -> Iterator[None]:
    """A Ray of our own on this machine or the cluster's, silent unless it fails; or the one that this process has."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's workers are nice: where other programs keep all processors busy they would get 3 % of one.
    os.environ.setdefault("RAY_worker_niceness", "0")
    no_dashboard = False if address == "local" else None  # of a cluster that runs it is not asked
    try:
        ray.init(
            address=address, include_dashboard=no_dashboard, log_to_driver=False, logging_level=logging.ERROR
        )
    except ConnectionError as error:
        raise InputError(f"--cluster {address}: this machine belongs to no Ray cluster: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def this_machine() -> Node:
    """The processor cores and GPUs that this process may use."""
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    return Node(socket.gethostname(), {"CPU": cores, "GPU": gpus}, {})


def cluster() -> list[Node]:
    """The living nodes of the Ray cluster that this process is attached to."""
    return [
        Node(node["NodeManagerHostname"], node["Resources"], node.get("Labels") or {}, node["NodeID"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def suitable(spec: JobSpec, nodes: Sequence[Node]) -> list[Node]:
    """The nodes with the labels and custom resources of the job. Raises InputError where there is none."""
    asked = spec.resources
    found = [
        node
        for node in nodes
        if asked.labels.items() <= dict(node.labels).items() and (not asked.custom or node.room(asked.custom))
    ]
    if not found:
        key = "labels" if asked.labels else "custom"
        raise InputError(
            f"resources.{key}: no node has {asked.labels or asked.custom}; there are "
            + "; ".join(f"{node.name} with {_described(node)}" for node in nodes)
        )
    return found


def _described(node: Node) -> str:
    own = {name: value for name, value in node.resources.items() if not name.startswith("node:")}
    return ", ".join(f"{name}: {value:g}" for name, value in own.items()) + (
        f", {dict(node.labels)}" if node.labels else ""
    )


def available(spec: JobSpec, nodes: Sequence[Node]) -> Resources:
    """Workers for a job on `nodes`, as if it were alone there.

    Raises InputError where not one fits, or more GPUs of a single machine are asked for than it has. On a cluster a
    number of workers is taken at its word: nodes may come.
    """
    asked = spec.resources
    nodes = suitable(spec, nodes)
    alone = nodes[0].id is None
    has_gpus = any(node.resources.get("GPU", 0) for node in nodes)
    gpus = (1.0 if has_gpus else 0.0) if asked.gpus == "auto" else asked.gpus
    if asked.cpus != "auto":
        cpus = asked.cpus
    elif gpus:
        cpus = 0  # a GPU's worker is not kept waiting for a core
    elif alone and asked.workers != "auto":
        cpus = max(1, int(nodes[0].resources["CPU"]) // asked.workers)
    else:
        cpus = 1
    needs = {"CPU": cpus, "GPU": gpus, **asked.custom}
    room = sum(node.room(needs) for node in nodes)
    workers = room if asked.workers == "auto" else asked.workers
    if not workers or (alone and gpus and workers > room):
        where = (
            f"this machine has {nodes[0].resources.get('GPU', 0):g} GPU(s)" if alone else "no node has room"
        )
        raise InputError(
            f"resources.workers: {asked.workers} were asked for, each with {gpus:g} GPU(s), but {where}"
            + ("" if alone else ": name a number of workers to wait for nodes that come")
        )
    threads = cpus or max(1, int(min(n.resources.get("CPU", 1) // (n.room(needs) + 1) for n in nodes)))
    return Resources("cuda" if gpus else "cpu", workers, threads, needs, asked.labels)


def check_files(spec: JobSpec, nodes: Sequence[Node], files: Mapping[str, Path]) -> None:
    """Raise InputError where a node of the cluster that may get a worker does not see the files as this process does.

    files: key in the job → file or folder; files must have the same size. Takes no resources of the nodes.
    """
    here = {key: (str(path), path.stat().st_size if path.is_file() else None) for key, path in files.items()}
    answers = [(node, look.remote(here)) for look, node in _everywhere(_unseen, spec, nodes)]
    problems = [f"{text} (node {node.name})" for node, answer in answers for text in ray.get(answer)]
    if problems:
        raise InputError("\n".join([*problems, "all nodes must see the same files under the same paths"]))


def _everywhere(
    function: Callable[..., object], spec: JobSpec, nodes: Sequence[Node]
) -> Iterator[tuple[Any, Node]]:
    """A function to be called on each node that may get a worker, without taking resources of it."""
    for node in suitable(spec, nodes):
        there = NodeAffinitySchedulingStrategy(str(node.id), soft=False)
        yield ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there), node


def _unseen(files: Mapping[str, tuple[str, int | None]]) -> list[str]:
    """What is missing or different here: files and their sizes in bytes, None for a folder."""
    problems = []
    for key, (text, size) in files.items():
        path = Path(text)
        if not path.exists():
            problems.append(f"{key}: {text}: no such file or folder")
        elif size is not None and path.stat().st_size != size:
            problems.append(
                f"{key}: {text}: {path.stat().st_size:,} bytes, and {size:,} where the job was started"
            )
    return problems


def trim_caches(spec: JobSpec, nodes: Sequence[Node]) -> None:
    """Have each host on which workers may run keep its cache of features within its limit; see `blocks.trim`."""
    if nodes[0].id is None:
        blocks.trim()
        return
    # Nobody waits for it, or minds where it fails.
    for trim, _ in _everywhere(blocks.trim, spec, nodes):
        trim.remote()


def start_workers(spec: JobSpec, reference: Reference, fingerprint: str, resources: Resources) -> Workers:
    """Ask for the workers and wait until the first one is ready. Ray must be initialised.

    Where others use the cluster too, the rest may get their places much later, and join then. Raises the error of a
    worker that cannot load, where no other is ready before. fingerprint: of the network that all must find.
    """
    needs = dict(resources.needs)
    # Threads that wait for each other sleep: where others use the processors too, spinning takes what it waits for.
    threading = {"OMP_NUM_THREADS": str(resources.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    actor = ray.remote(SamplerWorker).options(
        num_cpus=needs.pop("CPU"),
        num_gpus=needs.pop("GPU"),
        resources=needs,
        label_selector=dict(resources.labels),
        max_restarts=_RESTARTS,
        max_task_retries=0,  # a call that dies goes to another worker
        runtime_env={"env_vars": threading},
    )
    actors: list[Any] = [
        actor.remote(spec, resources.device, resources.threads) for _ in range(resources.workers)
    ]
    workers = Workers(actors, (ray.put(reference), fingerprint), grain=1)
    loading = [worker.load.remote(*workers.needs) for worker in actors]
    failure: Exception | None = None
    while loading:
        (one,), loading = ray.wait(loading, num_returns=1)
        try:
            return replace(workers, grain=ray.get(one))
        except ray.exceptions.RayActorError as error:  # its process died, another one's may not
            failure = LamtuneError(f"the sampler workers died while they loaded the model: {error}")
        except ray.exceptions.RayTaskError as error:
            # Without the frames of Ray around it.
            failure = error.cause if isinstance(error.cause, LamtuneError) else error
            break
    stop_workers(workers)
    assert failure is not None
    raise failure


def stop_workers(workers: Workers) -> None:
    """Give the processors or GPUs back, also where Ray goes on."""
    for worker in workers.actors:
        ray.kill(worker)
