"""Draws results as pictures (PNG, SVG, PDF). Knows what was measured, and nothing of how."""

import io
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from samplers.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from search.plots import Look, Panel, Plot

LOOKS: "Mapping[Look, tuple[str, str]]" = {
    "baseline": ("#777777", "X"),
    "first": ("#0072B2", "o"),
    "second": ("#D55E00", "s"),
    "third": ("#009E73", "^"),
    "fourth": ("#CC79A7", "v"),
    "fifth": ("#E69F00", "D"),
    "lost": ("#56B4E9", "x"),
    "fit": ("#CC79A7", ""),
    "join": ("#999999", ""),
}
"""Colour and marker of what a series is: Okabe and Ito's colours, which people with any colour vision can tell apart,
and markers that say the same."""

_INK = "#010203"  # stands for the text's colour of the page that a picture is part of
_PANEL = (4.6, 3.7)  # inches
_SIDE = 48  # pixels that an image of a grid has at least, nearly


def draw(plot: "Plot", ink: str = "black") -> "Figure":
    """A plot of a search; ink: the colour of axes and text. The background is transparent."""
    from matplotlib.figure import Figure

    width, height = _PANEL
    rows = math.ceil(len(plot.panels) / plot.columns)
    size = (1.5 * width if plot.columns == 1 else plot.columns * width, rows * height)
    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    places = figure.subplots(rows, plot.columns, squeeze=False).flatten()
    for axes in places[len(plot.panels) :]:
        axes.remove()
    for axes, panel in zip(places, plot.panels, strict=False):
        axes.set_facecolor("none")
        (_bars if plot.bars else _curves)(axes, panel)
        axes.set_title(_signs(panel.title), fontsize=10, color=ink)
        axes.set_xlabel(_signs(plot.x_label), color=ink)
        if not plot.bars:
            axes.set_ylabel(_signs(panel.y_label or plot.y_label), color=ink)
        _scale(axes, plot, panel)
        axes.tick_params(colors=ink, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        axes.grid(color="#888888", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        if not plot.bars:
            axes.legend(frameon=False, fontsize=8, labelcolor=ink)
    if plot.note:
        figure.supxlabel(_signs(plot.note), fontsize=8, color=ink)
    return figure


def _curves(axes: "Axes", panel: "Panel") -> None:
    for series in panel.series:
        colour, marker = LOOKS[series.look]
        axes.errorbar(
            series.x,
            series.y,
            yerr=series.errors,
            color=colour,
            linestyle={"fit": "--", "lost": ":"}.get(series.look, "-") if series.joined else "none",
            linewidth=1.2,
            marker=marker if series.markers else None,
            markersize=5,
            markevery=[-1] if series.look == "lost" else None,
            capsize=2.5,
            label=_signs(series.name) if series.shown else None,
            zorder=2 if series.markers else 1,
        )


def _bars(axes: "Axes", panel: "Panel") -> None:
    for series in panel.series:
        axes.barh(series.y, series.x, color=LOOKS[series.look][0], height=0.7)
    axes.set_yticks([s.y[0] for s in panel.series], [s.name for s in panel.series])
    axes.invert_yaxis()


def _scale(axes: "Axes", plot: "Plot", panel: "Panel") -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    if plot.falling:
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif plot.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(panel.marks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.tick_params(axis="x", labelrotation=45 if len(panel.marks) > 5 else 0)
    elif plot.bars:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _plain_svg(plot: "Plot") -> AbstractContextManager[None]:
    """SVG whose text is text, in the reader's font, and the same whenever it is written; ids differ between plots."""
    from matplotlib import rc_context

    return rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.key, "font.family": "sans-serif"})


def inline_svg(plot: "Plot") -> str:
    """A plot as an SVG element for a page of HTML, whose text colour it takes."""
    buffer = io.StringIO()
    with _plain_svg(plot):
        draw(plot, _INK).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    return text[text.index("<svg") :]


def grid(images: "Tensor") -> bytes:
    """A PNG of images, uint8 [N, C, H, W] with C = 1 or 3 on the CPU, in a square; small ones enlarged."""
    import numpy as np
    from PIL import Image

    pixels = images.permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    times, gap = max(1, _SIDE // max(height, width)), 2
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    h, w = height * times + gap, width * times + gap
    sheet = np.full((rows * h - gap, columns * w - gap, channels), 255, dtype=np.uint8)
    for place, image in enumerate(pixels.repeat(times, axis=1).repeat(times, axis=2)):
        top, left = place // columns * h, place % columns * w
        sheet[top : top + h - gap, left : left + w - gap] = image
    buffer = io.BytesIO()
    Image.fromarray(sheet.squeeze()).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_plot(plot: "Plot", path: Path) -> None:
    """Write a plot on white, as `save` does."""
    figure = draw(plot)
    figure.set_facecolor("white")
    with _plain_svg(plot):
        save(figure, path)


def _signs(text: str) -> str:
    """Indices as indices."""
    return text.replace("λ_t", r"$\lambda_t$").replace("δ_t", r"$\delta_t$")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure; the file's ending says how. Raises InputError."""
    try:
        dated = {"Date": None} if path.suffix == ".svg" else None  # the same file for the same picture
        figure.savefig(path, dpi=150, metadata=dated)
    except ValueError as error:  # an ending that it does not know
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
