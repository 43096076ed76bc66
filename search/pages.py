"""Writes findings as a page of HTML, Markdown, LaTeX tables, CSV or JSON. Knows nothing of how they came about.

A page of HTML is one file that needs no network: pictures are in it, and it follows the reader's light or dark.
"""

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from samplers.errors import InputError
from search import figures
from search.findings import Findings, Table

FORMATS = ("html", "md", "csv", "json", "tex")


def form_of(path: Path | None, asked: str | None) -> str:
    """The format that was asked for, or that of a file's ending; Markdown without either. Raises InputError."""
    if asked is not None:
        return asked
    if path is None:
        return "md"
    if (suffix := path.suffix.removeprefix(".")) not in FORMATS:
        raise InputError(f"{path}: the ending says none of {', '.join(FORMATS)}: name one with --format")
    return suffix


def write(found: Findings, form: str, plots: Path | None = None) -> str:
    """The text of a report in one of FORMATS. plots: a folder of plots that Markdown links to, as its readers will find
    it."""
    return _WRITERS[form](found, plots)


def save_plots(found: Findings, folder: Path) -> None:
    """Every plot as KEY.svg and KEY.png in a folder, which is made if need be. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plots {folder} cannot be made: {error.strerror}") from None
    for plot in found.plots:
        for suffix in ("svg", "png"):
            figures.save_plot(plot, folder / f"{plot.key}.{suffix}")
    for place, content in enumerate(found.pictures.values()):
        (folder / f"images-{place}.png").write_bytes(content)


# --- HTML ---------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #8884; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; margin: 2em auto;
       max-width: 75em; padding: 0 1em; }
.answer { font-size: 1.15em; border-left: 4px solid #0072B2; padding-left: 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; text-align: left; border-bottom: 1px solid var(--faint); white-space: nowrap; }
.note { font-size: .85em; opacity: .75; }
svg { max-width: 100%; height: auto; color: var(--ink); }
figure { display: inline-block; margin: 0 2em 1em 0; vertical-align: top; }
figure img { max-width: 30em; width: 100%; image-rendering: pixelated; background: #fff; }
pre { overflow-x: auto; background: var(--faint); padding: 1em; }
"""


def _html(found: Findings, plots: Path | None) -> str:
    e = html.escape
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{e(found.title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{e(found.title)}</h1>",
        f'<p class="answer">{e(found.answer)}</p>',
    ]
    tables = list(found.tables)
    if tables and tables[0].title == "Result":
        parts.append(_html_table(tables.pop(0)))
    if found.pictures:
        parts.append("<h2>Images</h2><p>The same random numbers with each schedule.</p>")
        for caption, content in found.pictures.items():
            data = base64.b64encode(content).decode()
            parts.append(
                f'<figure><img alt="{e(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{e(caption)}</figcaption></figure>"
            )
    for plot in found.plots:
        parts.append(f'<h2>{e(plot.title)}</h2><div class="wide">{figures.inline_svg(plot)}</div>')
    parts += [_html_table(table) for table in tables]
    parts.append(f"<h2>The job file</h2><pre>{e(_job_file(found))}</pre></body></html>")
    return "\n".join(parts) + "\n"


def _html_table(table: Table) -> str:
    e = html.escape
    head = "".join(f"<th>{e(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{e(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    heads = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    return (
        f'<h2>{e(table.title)}</h2><div class="wide"><table>{heads}<tbody>{rows}</tbody></table></div>'
        f'<p class="note">{e(table.note)}</p>'
    )


def _job_file(found: Findings) -> str:
    """As it may be submitted again, wherever its folder is then."""
    content = {key: value for key, value in found.job.spec.items() if key != "folder"}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text.replace(f"{found.job.spec.get('folder')}/", "")


# --- Markdown -----------------------------------------------------------------------------------------------


def _markdown(found: Findings, plots: Path | None) -> str:
    parts = [f"# {found.title}", found.answer]
    parts += [markdown_table(table) for table in found.tables]
    if plots is not None:
        parts += [f"## {plot.title}\n\n![{plot.title}]({plots / plot.key}.svg)" for plot in found.plots]
        shown = [
            f"{caption}\n\n![{caption}]({plots}/images-{n}.png)" for n, caption in enumerate(found.pictures)
        ]
        parts += ["## Images", *shown] if shown else []
    parts.append(f"## The job file\n\n```yaml\n{_job_file(found)}```")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table with its title and note."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"

    lines = [line(table.header), "|" + "---|" * len(table.header), *map(line, table.rows)]
    note = f"\n\n{table.note}".replace("*", "\\*") if table.note else ""
    return f"## {table.title}\n\n" + "\n".join(lines) + note


# --- LaTeX, CSV, JSON ---------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "λ": r"$\lambda$", "±": r"$\pm$", "·": r"$\cdot$",
    "–": "--", "…": r"\dots{}", "×": r"$\times$", "Γ": r"$\Gamma$", "η": r"$\eta$", "δ": r"$\delta$",
    "ε": r"$\epsilon$", "‖": r"$\Vert$", "−": "$-$", "é": r"\'e",
}  # fmt: skip


def _tex(found: Findings, plots: Path | None) -> str:
    parts = [f"% {found.title}: \\input this file; it needs no package.", _escaped(found.answer)]
    for table in found.tables:
        columns = "l" * len(table.header)
        rows = [table.header, *table.rows] if any(table.header) else table.rows
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
        if any(table.header):
            body.insert(1, r"\hline")
        lines = "\n".join(body)
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{_escaped(f'{table.title}. {table.note}'.strip())}}}\n"
            f"\\begin{{tabular}}{{{columns}}}\n\\hline\n{lines}\n\\hline\n\\end{{tabular}}\n\\end{{table}}"
        )
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    written = "".join(_TEX.get(sign, sign) for sign in text)
    return written.replace(r"$\lambda$\_t", r"$\lambda_t$").replace(r"$\delta$\_t", r"$\delta_t$")


def _csv(found: Findings, plots: Path | None) -> str:
    """A line for each trial, with numbers as they were stored."""
    columns = (
        "number", "phase", "state", "mean", "k", "b", "lambdas", "parameters", "images", "seed", "distance",
        "standard_error", "gain", "gain_error", "metrics", "network_evaluations", "seconds", "rungs",
    )  # fmt: skip
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["model", "dataset", "solver", "nfe", "job", *columns])
    job = found.job
    for evaluation in found.as_dict()["evaluations"]:
        values = [evaluation[column] for column in columns]
        cells = [json.dumps(value) if isinstance(value, dict | list) else value for value in values]
        writer.writerow([job.model, job.dataset, job.solver, job.nfe, job.id, *cells])
    return buffer.getvalue()


def _json(found: Findings, plots: Path | None) -> str:
    return json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n"


_WRITERS: Mapping[str, Callable[[Findings, Path | None], str]] = {
    "html": _html,
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "tex": _tex,
}
