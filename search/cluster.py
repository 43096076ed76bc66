"""Ships job files to a Ray cluster through Ray's own job server, and asks there how they are.

On the cluster the job runs as `lamtune submit … --cluster auto`, a driver beside its sampler workers. What is sent
(command, environment, job file) can be read by everybody who may see the cluster's dashboard, so it never holds a
database's password: the store is the cluster's own LAMTUNE_STORE. Knows nothing of stores and searches.
"""

import asyncio
import hashlib
import json
import logging
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobSubmissionClient

from samplers.errors import InputError, LamtuneError
from search.spec import JobSpec

_ANSWER_S = 10.0  # how long a cluster may take to answer the first time
_DIGITS = 10
# So long a driver may take to record that it was stopped, before Ray kills it. Ray's own 3 s is short on a busy host.
_STOP_S = 30


@dataclass(frozen=True, slots=True)
class Submission:
    """A job file on a cluster. `status`: Ray's PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    id: str
    status: str
    message: str
    exit_code: int | None

    @property
    def over(self) -> bool:
        """Nothing of it runs any more."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class Cluster:
    """A Ray cluster by the address of its job server, http://HEAD:8265.

    Raises InputError where it does not answer, or not to us.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        url = urlsplit(address)
        try:
            host, port = url.hostname, url.port or (443 if url.scheme == "https" else 80)
        except ValueError:
            host, port = None, 0
        if url.scheme not in ("http", "https") or not host or url.username is not None:
            raise InputError(
                f"--cluster {_safe(address)}: write http://HEAD:8265, the address of Ray's dashboard"
            )
        try:  # Ray's own client waits for minutes
            socket.create_connection((host, port), timeout=_ANSWER_S).close()
        except OSError as error:
            raise InputError(f"--cluster {address} does not answer: {error}") from None
        with self._answering():
            self._client = JobSubmissionClient(address)
        logging.getLogger("ray").setLevel(logging.WARNING)  # else it tells of every package

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """What goes wrong between Ray's client and the cluster comes out as InputError."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise InputError(
                f"--cluster {self._address} wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from None
        except (OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
            raise InputError(f"--cluster {self._address}: {' '.join(str(error).split())}") from None

    def submit(self, spec: JobSpec, text: str, store: str | None) -> tuple[str, bool]:
        """Ship a job, the text of a job file that holds `spec`; return its id, and whether it is new.

        The same job is not sent twice while it runs. store: a URL without a password, None: the cluster's own.
        """
        words = ["lamtune", "submit", "-", "--cluster", "auto", "--folder", str(spec.folder)]
        # In the command, and not as a working directory, which Ray may remove under a running driver.
        return self._send(
            [spec.as_dict(), store], f"printf %s {shlex.quote(text)} | {shlex.join(words)}", store
        )

    def resume(self, job_id: int, store: str | None) -> tuple[str, bool]:
        """Have a job of the cluster's store go on; see `submit`."""
        return self._send([job_id, store], f"lamtune resume {job_id} --cluster auto", store)

    def _send(self, identity: Any, command: str, store: str | None) -> tuple[str, bool]:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        base = f"lamtune-{digest[:_DIGITS]}"
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}
        if store is not None:
            environment["LAMTUNE_STORE"] = store
        with self._answering():
            known = {job.submission_id: str(job.status.value) for job in self._client.list_jobs()}
            names = (base if n == 1 else f"{base}-{n}" for n in count(1))
            name = next(n for n in names if n not in known or not Submission(n, known[n], "", None).over)
            if name in known:
                return name, False
            self._client.submit_job(
                entrypoint=command,
                submission_id=name,
                runtime_env={"env_vars": environment},
            )
        return name, True

    def submission(self, name: str) -> Submission:
        """How a submission is; LamtuneError if the cluster does not know it."""
        with self._answering():
            for job in self._client.list_jobs():
                if job.submission_id == name:
                    message = (job.message or "").partition(", last available logs")[0]  # `logs` has them
                    return Submission(name, str(job.status.value), message, job.driver_exit_code)
        raise LamtuneError(f"--cluster {self._address} has no submission {name}")

    def logs(self, name: str) -> str:
        """All that a submission has printed so far."""
        self.submission(name)
        with self._answering():
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, show: Callable[[str], Any]) -> Submission:
        """Show what a submission prints until it is over."""

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(name):
                show(lines)

        self.submission(name)
        with self._answering():
            asyncio.run(tail())
        return self.submission(name)

    def stop(self, name: str) -> None:
        """Stop a submission as `kill` would: its driver records that its job was cancelled."""
        if self.submission(name).over:
            raise LamtuneError(f"{name} is over already")
        with self._answering():
            self._client.stop_job(name)


def _safe(address: str) -> str:
    """Without a user and a password, which somebody may have written before the host."""
    return address.rpartition("@")[2]
