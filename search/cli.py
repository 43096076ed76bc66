"""The command line: `lamtune …`. Parses words, calls the packages, prints tables or JSON.

Imports torch, Ray and Optuna only inside the commands that need them, so that `best`, `jobs` and `--help` answer
at once. Catches only LamtuneError: anything else is a bug and shows its traceback.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from samplers.errors import InputError, LamtuneError

if TYPE_CHECKING:
    from search.cluster import Cluster

DEMO = Path(__file__).with_name("demo.yaml")
DEFAULT_STORE = "sqlite:///lamtune.db"
_STORE_HELP = f"Database URL: SQLite or PostgreSQL.  [env: LAMTUNE_STORE; default: {DEFAULT_STORE}]"


class _Group(click.Group):
    """Turns every LamtuneError into its message and exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LamtuneError as error:
            click.echo(f"lamtune: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("lamtune: interrupted; submit the same job again to go on", err=True)
            sys.exit(130)


def _store_option(command: Any) -> Any:
    return click.option(
        "--store", envvar="LAMTUNE_STORE", default=DEFAULT_STORE, metavar="URL", help=_STORE_HELP
    )(command)


_cluster_option = click.option(
    "--cluster",
    envvar="LAMTUNE_CLUSTER",
    metavar="ADDRESS",
    help="The job server of a Ray cluster, http://HEAD:8265.  [env: LAMTUNE_CLUSTER]",
)
_wait_option = click.option(
    "--wait", is_flag=True, help="With --cluster ADDRESS: show the job's output until it has ended."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lamtune")
def main() -> None:
    """Find the epsilon-scaling schedule λ_t = k·t + b that gives a diffusion model its best images.

    \b
    Try it:            lamtune demo
    Your own model:    lamtune submit job.yaml
    What was found:    lamtune best --model M --dataset D --nfe 20
    Use it elsewhere:  lamtune export --model M --dataset D --nfe 20
    Why it helps:      lamtune diagnose job.yaml --schedule best
    Look at it:        lamtune watch ID, lamtune report ID -o report.html, lamtune dashboard
    Complete words:    eval "$(_LAMTUNE_COMPLETE=bash_source lamtune)"     (or zsh_source, fish_source)
    """


@main.command()
@_store_option
def demo(store: str) -> None:
    """Search the schedule of the bundled digits network (no download; a minute or two on two cores).

    The job is search/demo.yaml: the mean λ, then k, with few images, and the result on 10,000 fresh ones.
    """
    from search.runner import submit as run
    from search.spec import load

    run(load(DEMO), store)


@main.command()
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.yaml")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where the job's relative paths start.  [default: the job file's folder]",
)
@_cluster_option
@_wait_option
@_store_option
@click.pass_context
def submit(
    ctx: click.Context, job: Path, folder: Path | None, cluster: str | None, wait: bool, store: str
) -> None:
    """Run the search that a job file describes, on this machine or on a Ray cluster.

    \b
    A job file:
      model:     {name: adm-cifar10, format: adm, path: cifar10.pt, options: {image_size: 32, …}}
      dataset:   {name: cifar10, reference: cifar10-stats.npz}    # or a folder or archive of images
      features:  inception-v3-compat                              # or a TorchScript file
      sampling:  {solver: ddpm, nfe: [20, 50]}                    # ddpm, ddim, euler, heun, …
      search:    {strategy: adaptive, images: 10000, seed: 0}     # or free, or paper

    A job that was interrupted goes on where it stopped when it is submitted again. `-` reads the standard input.

    With --cluster http://HEAD:8265 the job is sent there, and its id printed at once. Its paths are those of the
    cluster's nodes, and its store is the cluster's own LAMTUNE_STORE, or a --store URL without a password.
    --cluster auto runs it from here on the cluster that this machine belongs to.
    """
    from search.spec import loads, read

    text = read(job)
    spec = loads(text, str(job), job.parent if folder is None else folder)
    if cluster is None:
        from search.runner import submit as run

        run(spec, store)
        return
    if cluster == "auto":
        from search.runner import submit as run

        run(spec, _clusters_store(ctx, store), cluster=True)
        return
    named = _named_store(ctx, store)
    from search.cluster import Cluster

    _sent(there := Cluster(cluster), there.submit(spec, text, named), wait)


@main.command()
@click.argument("job", type=int, metavar="ID")
@_cluster_option
@_wait_option
@_store_option
@click.pass_context
def resume(ctx: click.Context, job: int, cluster: str | None, wait: bool, store: str) -> None:
    """Have a job of the store go on, by its number, without its job file.

    What was measured is not measured again. Its files must be where they were, and what they were. --cluster as in
    `lamtune submit`.
    """
    if cluster is None or cluster == "auto":
        from search.runner import resume as run

        run(job, store if cluster is None else _clusters_store(ctx, store), cluster=cluster is not None)
        return
    named = _named_store(ctx, store)
    from search.cluster import Cluster

    _sent(there := Cluster(cluster), there.resume(job, named), wait)


def _clusters_store(ctx: click.Context, store: str) -> str:
    """The store of a driver that runs on a cluster."""
    from storage import refuse_sqlite

    if ctx.get_parameter_source("store") is ParameterSource.DEFAULT:
        raise InputError("--cluster auto: there is no store: set LAMTUNE_STORE where the cluster runs")
    refuse_sqlite(store)
    return store


def _named_store(ctx: click.Context, store: str) -> str | None:
    """The store that is sent along with a job: what the environment holds stays here."""
    from storage import refuse_secret, refuse_sqlite

    if ctx.get_parameter_source("store") is not ParameterSource.COMMANDLINE:
        return None
    refuse_sqlite(store)
    refuse_secret(store)
    return store


def _sent(there: "Cluster", submission: tuple[str, bool], wait: bool) -> None:
    """Say what a submission is called, and show it until it is over if asked to."""
    name, new = submission
    click.echo(name)
    if not new:
        click.echo("this job is there already and has not ended", err=True)
    if wait:
        ended = there.follow(name, lambda text: click.echo(text, nl=False))
        if ended.status != "SUCCEEDED":
            click.echo(f"lamtune: {name}: {ended.status}: {ended.message}", err=True)
            sys.exit(ended.exit_code or 1)


@main.command()
@click.argument("job", metavar="ID")
@_cluster_option
@_store_option
def status(job: str, cluster: str | None, store: str) -> None:
    """Show how a job is: by its number in the store, or a submission by its name on the cluster."""
    if not job.isdecimal():
        found = _cluster(cluster).submission(job)
        click.echo(f"{found.id}: {found.status}" + (f": {found.message}" if found.message else ""))
        return
    from search.report import job_as_text
    from storage import open_store

    with open_store(store) as opened:
        click.echo(job_as_text(opened.job(int(job)), opened.evaluations(int(job)), opened.now()))


@main.command()
@click.argument("job", type=int, metavar="ID")
@_store_option
def watch(job: int, store: str) -> None:
    """Follow a running search by its number in the store until it is over; Ctrl-C stops watching, not the search."""
    from rich.console import Console

    from search.watch import follow
    from storage import open_store

    with open_store(store) as opened:
        try:
            follow(opened, job, Console())
        except KeyboardInterrupt:
            click.echo(f"lamtune: stopped watching; job {job} goes on", err=True)


@main.command()
@click.argument("submission", metavar="NAME")
@click.option("--follow", is_flag=True, help="Go on until it has ended.")
@_cluster_option
def logs(submission: str, follow: bool, cluster: str | None) -> None:
    """Print what a submission on a cluster has printed; `lamtune submit --cluster` gave its name."""
    there = _cluster(cluster)
    if follow:
        there.follow(submission, lambda text: click.echo(text, nl=False))
    else:
        click.echo(there.logs(submission), nl=False)


@main.command()
@click.argument("job", metavar="ID")
@_cluster_option
@_store_option
def cancel(job: str, cluster: str | None, store: str) -> None:
    """Cancel a job by its number in the store, or a submission by its name on the cluster.

    What was measured stays; submit the job again to go on.
    """
    if not job.isdecimal():
        _cluster(cluster).stop(job)
        return
    from storage import STALE_S, open_store

    with open_store(store) as opened:
        found = opened.cancel(int(job), stale_after=STALE_S)
    if found.finished_at is None:
        click.echo(f"job {job} will stop within some seconds")


def _cluster(address: str | None) -> "Cluster":
    if address is None or address == "auto":
        raise InputError("which cluster? Give --cluster http://HEAD:8265 or set LAMTUNE_CLUSTER")
    from search.cluster import Cluster

    return Cluster(address)


@main.command()
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="So many at most.")
@click.option("--before", type=int, metavar="ID", help="Only jobs older than this one: the next page.")
@_store_option
@_json_option
def jobs(limit: int, before: int | None, store: str, as_json: bool) -> None:
    """List the searches in the store, newest first."""
    from storage import open_store

    with open_store(store) as opened:
        found = opened.jobs(limit=limit, before_id=before)
    rows = [
        {
            "id": j.id,
            "model": j.model,
            "dataset": j.dataset,
            "solver": j.solver,
            "nfe": j.nfe,
            "status": j.status,
        }
        for j in found
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows and before is not None:
        click.echo(f"no job is older than {before}")
    elif not rows:
        click.echo("no jobs yet: try `lamtune demo` or `lamtune submit JOB.yaml`")
    else:
        table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            click.echo(
                "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            )
        if len(rows) == limit and found[-1].id > 1:
            click.echo(f"older ones: lamtune jobs --before {found[-1].id}")


@main.command()
@click.option("--model", required=True, help="The model's name in its job file.")
@click.option("--dataset", required=True, help="The dataset's name in its job file.")
@click.option("--nfe", required=True, type=int, help="Number of network evaluations per image.")
@click.option("--solver", help="Only this solver (ddpm, heun, …); default: the best of all.")
@_store_option
@_json_option
def best(model: str, dataset: str, nfe: int, solver: str | None, store: str, as_json: bool) -> None:
    """Show the best schedule that the store knows for a model, dataset and NFE."""
    from search.report import best_as_dict, best_as_text, runner_up
    from storage import open_store

    with open_store(store) as opened:
        found = opened.best(model=model, dataset=dataset, nfe=nfe, solver=solver)
        second = runner_up(found, opened.evaluations(found.job_id))
    if as_json:
        answer = best_as_dict(found) | {"runner_up": None if second is None else asdict(second)}
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(best_as_text(found, second))


@main.command()
@click.option("--model", required=True, help="The model's name in its job file.")
@click.option("--dataset", required=True, help="The dataset's name in its job file.")
@click.option("--nfe", required=True, type=int, help="Number of network evaluations per image.")
@click.option("--solver", help="Only this solver (ddpm, heun, …); default: the best of all.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "adm-es", "edm-es", "comfyui", "diffusers"]),
    default="json",
    show_default=True,
    help="For whom: JSON for programs and samplers.apply, or the values that another program takes.",
)
@click.option(
    "--job",
    type=click.Path(path_type=Path),
    metavar="JOB.yaml",
    help="Also write the timestep or sigma of each evaluation (json), from the network of this job file.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: standard output."
)
@_store_option
def export(
    model: str,
    dataset: str,
    nfe: int,
    solver: str | None,
    form: str,
    job: Path | None,
    output: Path | None,
    store: str,
) -> None:
    """Write the best schedule in the form in which another program takes it."""
    from search.export import export as write
    from search.export import network_times
    from storage import open_store

    with open_store(store) as opened:
        found = opened.best(model=model, dataset=dataset, nfe=nfe, solver=solver)
    times = None
    if job is not None:
        from search.spec import load

        times = network_times(load(job), found)
    text = write(found, form, times) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)


@main.command()
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.yaml")
@click.option("--nfe", type=int, help="Which of the job's samplings, where it has several.")
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="best|K,B",
    help="Beside λ = 1: the store's best, or λ_t = K·t + B; may be repeated.",
)
@click.option(
    "--images", type=click.IntRange(2), default=10_000, show_default=True, help="Images per schedule."
)
@click.option("--late", metavar="T,T,…", help="Also start from real images noised to these evaluations.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIAGNOSIS.json")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png|svg", help="Draw the curves.")
@_store_option
@_json_option
def diagnose(
    job: Path,
    nfe: int | None,
    schedules: tuple[str, ...],
    images: int,
    late: str | None,
    output: Path | None,
    plot: Path | None,
    store: str,
    as_json: bool,
) -> None:
    """Measure the exposure bias of a job's network on this machine: what epsilon scaling corrects.

    The size of the noise that the solver removes (ε/λ) and of what the network predicts in training, their ratio, and
    the distance δ_t between the states of both, at every evaluation. It is kept in the store with the newest search of
    the same network and solver, whose report and dashboard show it. Give a DIAGNOSIS.json in place of the job to show,
    draw or keep it again.
    """
    from search import bias

    if job.suffix == ".json":
        found = bias.read(job)
    else:
        from search import diagnose as diagnosis

        found = diagnosis.run(job, nfe, schedules, images, late, store)
    text = json.dumps(found.as_dict(), indent=2)
    if output is not None:
        _write(output, text + "\n")
    if plot is not None:
        from search import figures, plots

        figures.save_plot(plots.exposure(found), plot)
    click.echo(text if as_json else bias.as_text(found))
    from search.dashboard import keep
    from storage import open_store

    with open_store(store) as opened:
        kept = keep(opened, found)
        if kept is None:
            click.echo(
                f"the store {opened.safe_url} has no job of this network and solver to keep it with", err=True
            )
        else:
            click.echo(f"kept in the store {opened.safe_url} with job {kept.id}", err=True)


@main.command()
@click.argument("job", type=int, required=False, metavar="[ID]")
@click.option("--model", help="In place of an ID: the model's name in its job file,")
@click.option("--dataset", help="the dataset's,")
@click.option("--nfe", type=int, help="the number of network evaluations per image,")
@click.option("--solver", help="and the solver; default: the best of all.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: standard output."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "md", "csv", "json", "tex"]),
    help="Default: as FILE's ending says; md without FILE.",
)
@click.option(
    "--plots",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the plots there too, as SVG and PNG.",
)
@click.option("--dashboard", is_flag=True, help="Renew the job's note and plots in `lamtune dashboard` too.")
@_store_option
def report(
    job: int | None,
    model: str | None,
    dataset: str | None,
    nfe: int | None,
    solver: str | None,
    output: Path | None,
    form: str | None,
    plots: Path | None,
    dashboard: bool,
    store: str,
) -> None:
    """Write what a search has found: the answer, tables, plots, sensitivity, cost, and how to do it again.

    An .html is one file that needs no network. A job's ID is in `lamtune jobs`.
    """
    from search import findings, pages
    from storage import open_store

    form = pages.form_of(output, form)
    with open_store(store) as opened:
        if job is None:
            if model is None or dataset is None or nfe is None:
                raise InputError("name a job's ID, or --model, --dataset and --nfe")
            job = opened.best(model=model, dataset=dataset, nfe=nfe, solver=solver).job_id
        found = findings.of_job(opened, job)
        if dashboard:
            from search.dashboard import publish

            publish(opened, job)
    if plots is not None:
        pages.save_plots(found, plots)
        if output is not None:
            plots = Path(os.path.relpath(plots, output.parent))
    text = pages.write(found, form, plots)
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file with the token that requests must bring.  [default: the environment's LAMTUNE_TOKEN]",
)
@_store_option
def serve(host: str, port: int, token_file: Path | None, store: str) -> None:
    """Serve the store over HTTP, to read: Optuna's dashboard, /api/best, /api/jobs and /api/health.

    On this machine alone (loopback) no token is needed. Browsers give it as the password, with any user name;
    programs as `Authorization: Bearer TOKEN`. GET /api/openapi.json describes the API.
    """
    from search import service
    from storage import open_store

    token = service.token_for(host, token_file, os.environ.get("LAMTUNE_TOKEN"))
    with open_store(store) as opened:
        click.echo(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)")
        service.serve(opened, host, port, token)


main.add_command(serve, "dashboard")


@main.group("store")
def store_group() -> None:
    """Look after the store's tables."""


@store_group.command()
@_store_option
def upgrade(store: str) -> None:
    """Bring the store's tables to this program's version, as every command does that opens it."""
    from storage import check_store, open_store

    open_store(store).close()
    click.echo(f"schema version {check_store(store)}")


@store_group.command()
@_store_option
def check(store: str) -> None:
    """Say whether the store's tables are of this program's version, and change nothing."""
    from storage import check_store

    click.echo(f"schema version {check_store(store)}, up to date")


@main.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="STATS.npz")
@click.option(
    "--features",
    default="inception-v3-compat",
    show_default=True,
    help="An extractor's name or a TorchScript file, as in the job file.",
)
@click.option(
    "--resize", type=int, metavar="SIDE", help="Scale and crop to SIDE×SIDE pixels, as ADM's loader does."
)
def reference(images: Path, output: Path, features: str, resize: int | None) -> None:
    """Compute the statistics of real images once, for `dataset.reference` of many jobs.

    IMAGES is a folder (with sub-folders), a .zip or .tar archive, or an .npz of images (arr_0). The file has
    EDM's layout (mu, sigma) and remembers which extractor it belongs to.
    """
    from rich.progress import Progress

    from objectives.features import load_extractor
    from objectives.reference import compute_reference, image_shape
    from search.evaluator import accelerator

    shape = image_shape(images, resize)
    extractor = load_extractor(features, shape).to(accelerator())
    if not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}")
    with Progress(transient=True) as bar:
        task = bar.add_task("features", total=None)
        statistics = compute_reference(
            images,
            extractor,
            shape,
            resize=resize is not None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    statistics.save(output)
    click.echo(f"{output}: {statistics.n:,} images, {statistics.dim} features of {extractor.name}")
