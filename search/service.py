"""The store over HTTP, to read: Optuna's dashboard and a JSON API in one ASGI application, behind one guard.

Exact paths under /api are ours (see `GET /api/openapi.json`); every other path is the dashboard's. Nothing can be
changed: the dashboard could delete studies. Knows nothing of searches: it reads the store that they write.
"""

import base64
import binascii
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import uvicorn
from a2wsgi import WSGIMiddleware
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security.http import HTTPBase
from optuna_dashboard import wsgi
from pydantic import ConfigDict
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from samplers.errors import InputError, LamtuneError
from storage import Best, Evaluation, Job, JobStatus, NotInStore, Pictures, Store

HEALTH = "/api/health"
"""The one path that answers without a token; it tells nothing but that the service lives."""

_SHORTEST_TOKEN = 16
_PAGE = 50
_LARGEST_PAGE = 500

_HEADERS = {
    "Cache-Control": "private, no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
}
_NOTHING_RUNS = (
    "default-src 'none'; frame-ancestors 'self'"  # the dashboard's pages bring a policy of their own
)

# What a database can hold and compare: text without NUL, whole numbers of 32 bits.
_Name = Annotated[str, Query(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]
_Id = Annotated[int, Query(ge=1, lt=2**31)]
_Number = Annotated[int, Query(ge=0, lt=2**31)]
_Limit = Annotated[int, Query(ge=1, le=_LARGEST_PAGE)]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no answer."""

    detail: str


@dataclass(frozen=True, slots=True)
class Health:
    """The service lives."""

    status: str


@dataclass(frozen=True, slots=True)
class JobHistory:
    """A job and a page of the schedules that it tried, by ascending number; influences are URL-safe base64."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_bytes="base64")

    job: Job
    evaluations: Sequence[Evaluation]


def token_for(host: str, file: Path | None, given: str | None) -> str | None:
    """The token that requests to a listener on `host` must bring: a file's, else the given one (LAMTUNE_TOKEN).

    None where there is neither, which only loopback may have. Raises InputError, which repeats no token.
    """
    if file is not None:
        try:
            given = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise InputError(f"--token-file {file} cannot be read: {reason}") from None
    if given is None:
        if is_loopback(host):
            return None
        raise InputError(
            f"--host {host} can be reached from other machines, so a token is needed: "
            "give --token-file FILE or set LAMTUNE_TOKEN"
        )
    if len(given) < _SHORTEST_TOKEN:
        raise InputError(
            f"{'LAMTUNE_TOKEN' if file is None else f'--token-file {file}'}: the token has {len(given)} characters "
            f"and must have {_SHORTEST_TOKEN} or more: `openssl rand -hex 16` makes one"
        )
    return given


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`, a name or an IP address without its port."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def serve(store: Store, host: str, port: int, token: str | None) -> None:
    """Serve the store until SIGINT or SIGTERM; `token` is that of `token_for` this host."""
    uvicorn.run(
        create_app(store, token),
        host=host,
        port=port,
        ws="none",
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )


def create_app(store: Store, token: str | None) -> ASGIApp:
    """The whole service. Without a token it answers only to requests that name a loopback host."""
    # The guard checks the token; here the two ways to bring it are named for OpenAPI.
    schemes = [
        Depends(HTTPBase(scheme=name, scheme_name=name, auto_error=False)) for name in ("basic", "bearer")
    ]
    app = FastAPI(
        title="lamtune",
        description="The best epsilon-scaling schedules λ_t = k·t + b, and how they were found.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_api_route(HEALTH, _health, methods=["GET"])
    app.include_router(_routes(store), dependencies=[Depends(_once), *(schemes if token is not None else ())])
    app.add_exception_handler(LamtuneError, _problem)
    app.mount("/", cast(ASGIApp, WSGIMiddleware(wsgi(store.optuna_storage(), Pictures(store)))))
    return Guard(app, token)


def _health() -> Health:
    """Say that the service lives; the database is not asked."""
    return Health("ok")


def _problem(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 404 if isinstance(error, NotInStore) else 503)


def _once(request: Request) -> None:
    """Refuse a parameter that is given more than once: the last one would count, silently."""
    names = [name for name, _ in request.query_params.multi_items()]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise RequestValidationError(
            [{"type": "repeated", "loc": ("query", name), "msg": "given more than once"} for name in repeated]
        )


def _routes(store: Store) -> APIRouter:
    """The API on a store; every function runs in a thread."""
    routes = APIRouter(
        prefix="/api",
        responses={
            401: {"model": Problem, "description": "No valid token"},
            503: {"model": Problem, "description": "The database does not answer"},
        },
    )
    missing: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "Not in the store"}}

    @routes.get("/best", responses=missing)
    def best(
        model: _Name,
        dataset: _Name,
        nfe: Annotated[int, Query(ge=1, lt=2**31)],
        solver: _Name | None = None,
    ) -> Best:
        """The best schedule that the store knows for a model, a dataset, an NFE and, if given, a solver."""
        return store.best(model=model, dataset=dataset, nfe=nfe, solver=solver)

    @routes.get("/jobs")
    def jobs(
        limit: _Limit = _PAGE,
        before_id: _Id | None = None,
        model: _Name | None = None,
        dataset: _Name | None = None,
        status: JobStatus | None = None,
    ) -> Sequence[Job]:
        """The newest jobs first; for the next page give the last one's id as `before_id`."""
        return store.jobs(model=model, dataset=dataset, status=status, limit=limit, before_id=before_id)

    @routes.get("/jobs/{job_id}", responses=missing)
    def job(
        job_id: Annotated[int, InPath(ge=1, lt=2**31)],
        limit: _Limit = _PAGE,
        after_number: _Number | None = None,
    ) -> JobHistory:
        """One job and the schedules that it tried; for the next page give the last one's number as `after_number`."""
        return JobHistory(store.job(job_id), store.evaluations(job_id, limit, after_number))

    return routes


class Guard:
    """Lets through what may read, as ASGI around an application; adds the headers that browsers keep to.

    token: wanted from every request but HEALTH, as `Authorization: Bearer TOKEN` or as the password of HTTP Basic
    with any user name; who has none learns nothing, not even which paths there are. None: requests must name a
    loopback host instead, or a web page elsewhere could read the store by a name that it points here.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Content-Security-Policy", _NOTHING_RUNS)
            await send(message)

        assert scope["type"] == "http", scope["type"]
        answer = self._refusal(scope) or self._app
        if scope["method"] == "HEAD":  # the server sends a GET's headers and drops its body
            scope = {**scope, "method": "GET"}
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        if self._token is None:
            if not is_loopback(_without_port(headers.get("host", ""))):
                return JSONResponse({"detail": "the Host is not this machine's loopback"}, 421)
        elif scope["path"] != HEALTH and not self._authorised(headers.get("authorization", "")):
            asked = {"WWW-Authenticate": 'Basic realm="lamtune", charset="UTF-8", Bearer'}
            return JSONResponse({"detail": "a token is needed"}, 401, asked)
        if scope["method"] not in ("GET", "HEAD"):
            return JSONResponse({"detail": "the service only reads"}, 405, {"Allow": "GET, HEAD"})
        return None

    def _authorised(self, authorization: str) -> bool:
        assert self._token is not None
        scheme, _, credentials = authorization.partition(" ")
        given = credentials.strip().encode("latin-1")  # as header values are read
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return secrets.compare_digest(given, self._token.encode())


def _without_port(host: str) -> str:
    """The name of a Host header: `localhost` of localhost:8080, `[::1]` of [::1]:8080."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host
