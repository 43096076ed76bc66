"""Puts findings into Optuna's dashboard: a note with answer and tables, and interactive plots, per study.

The dashboard draws plots from Plotly's JSON, which is plain data: Plotly itself is not needed. Knows nothing of how
findings come about.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from search import findings, pages
from search.bias import Diagnosis
from search.figures import LOOKS
from search.findings import Findings
from search.plots import Plot, Series
from storage import Job, Store

_SYMBOLS = {
    "X": "x",
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "D": "diamond",
    "x": "x-thin-open",
}
_DASHES = {"fit": "dash", "lost": "dot"}
_GAP = 0.12  # between panels, as a share of the plot
_INK = "#888888"  # readable on the dashboard's light and dark


def publish(store: Store, job_id: int) -> None:
    """Write or renew what the dashboard shows of a job. NotInStore."""
    import optuna
    from optuna_dashboard import save_note, save_plotly_graph_object

    found = findings.of_job(store, job_id)
    with store.errors():
        study = optuna.load_study(study_name=found.job.study_name, storage=store.optuna_storage())
        save_note(study, note(found))
        for plot in found.plots:
            save_plotly_graph_object(study, _Json(plotly(plot)), graph_object_id=plot.key)


def keep(store: Store, found: Diagnosis) -> Job | None:
    """Put a diagnosis into the store and the dashboard, with the newest job of its network and solver; None: there is
    none."""
    content = found.as_dict()
    job = store.add_diagnosis(
        content,
        model=found.model,
        model_fingerprint=found.model_fingerprint,
        dataset=found.dataset,
        sampling=content["sampling"],
    )
    if job is not None:
        with suppress(KeyError):  # its search has not begun
            publish(store, job.id)
    return job


class _Json:
    """Plain data as what the dashboard takes for a figure of Plotly."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content

    def to_json(self) -> str:
        """The text."""
        return json.dumps(self._content)


def note(found: Findings) -> str:
    """Markdown: the answer, every table, and what is to be known of the plots."""
    parts = [f"# {found.title}", found.answer, *(pages.markdown_table(table) for table in found.tables)]
    parts += ["## Plots", *(f"{plot.title}: {plot.note}" for plot in found.plots if plot.note)]
    return "\n\n".join(parts)


def plotly(plot: Plot) -> dict[str, Any]:
    """A plot in Plotly's JSON (`data` and `layout`)."""
    rows = math.ceil(len(plot.panels) / plot.columns)
    width, height = (1 - _GAP * (plot.columns - 1)) / plot.columns, (1 - _GAP * 2 * (rows - 1)) / rows
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "title": {"text": plot.title},
        "annotations": [],
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": _INK},
        "legend": {"orientation": "h", "y": -0.25},
        "margin": {"t": 80},
        "showlegend": not plot.bars,
    }
    named: set[str] = set()
    for place, panel in enumerate(plot.panels):
        suffix = "" if place == 0 else str(place + 1)
        row, column = divmod(place, plot.columns)
        left, bottom = column * (width + _GAP), (rows - 1 - row) * (height + 2 * _GAP)
        lowest = place + plot.columns >= len(plot.panels)
        axis: dict[str, Any] = {
            "title": {"text": plot.x_label if lowest else ""},
            "domain": [left, left + width],
            "anchor": f"y{suffix}",
        }
        if plot.falling:
            axis["autorange"] = "reversed"
        if plot.log_x:
            axis |= {"type": "log", "tickvals": panel.marks, "ticktext": [f"{x:,.0f}" for x in panel.marks]}
        side: dict[str, Any] = {
            "title": {"text": plot.y_label if column == 0 else ""},
            "domain": [bottom, bottom + height],
            "anchor": f"x{suffix}",
        }
        if plot.bars:
            side |= {
                "title": {"text": ""},
                "automargin": True,
                "autorange": "reversed",
                "tickvals": [one.y[0] for one in panel.series],
                "ticktext": [one.name for one in panel.series],
            }
        for one in (axis, side):
            one |= {"gridcolor": "rgba(136,136,136,0.25)", "zeroline": False}
        layout |= {f"xaxis{suffix}": axis, f"yaxis{suffix}": side}
        layout["annotations"].append(
            {
                "text": panel.y_label or panel.title,
                "x": left + width / 2,
                "xanchor": "center",
                "y": bottom + height,
                "yanchor": "bottom",
                "xref": "paper",
                "yref": "paper",
                "showarrow": False,
            }
        )
        for series in panel.series:
            trace = _bar(series) if plot.bars else _curve(series)
            shown = series.shown and series.name not in named
            named.add(series.name)
            data.append(trace | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "showlegend": shown})
    return {"data": data, "layout": layout}


def _curve(series: Series) -> dict[str, Any]:
    colour, marker = LOOKS[series.look]
    modes = [name for name, on in (("lines", series.joined), ("markers", series.markers)) if on]
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": series.name,
        "legendgroup": series.name,
        "mode": "+".join(modes),
        "x": list(series.x),
        "y": list(series.y),
        "text": list(series.texts),
        "line": {"color": colour, "dash": _DASHES.get(series.look, "solid"), "width": 1.5},
    }
    if series.markers:
        trace["marker"] = {
            "color": colour,
            "symbol": _SYMBOLS[marker],
            "size": 8,
            "line": {"color": colour, "width": 1},
        }
    if series.errors is not None:
        trace["error_y"] = {"type": "data", "array": list(series.errors)}
    return trace


def _bar(series: Series) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": series.name,
        "x": list(series.x),
        "y": list(series.y),
        "marker": {"color": LOOKS[series.look][0]},
    }
