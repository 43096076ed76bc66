"""Draws results as pictures (PNG, SVG, PDF). Knows what was measured, and nothing of how."""

from pathlib import Path
from typing import TYPE_CHECKING

from samplers.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from search.diagnose import Diagnosis

# Okabe and Ito's colours, which people with any colour vision can tell apart; each also has a marker of its own.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")
_TRAINING = "#555555"


def diagnosis(found: "Diagnosis") -> "Figure":
    """‖ε‖ in training and sampling, their ratio, and δ_t, over the evaluations as sampling goes, from left to right."""
    from matplotlib.figure import Figure  # half a second, and no window: figures are only written to files

    figure = Figure(figsize=(12, 3.8), layout="constrained", facecolor="white")
    norms, ratios, deltas = figure.subplots(1, 3)
    steps = range(found.nfe)
    norms.plot(steps, found.training, color=_TRAINING, linestyle="--", label="training")
    deltas.plot(
        steps, found.floor, color=_TRAINING, linestyle="--", label=f"floor of {found.images:,} states"
    )
    ratios.axhline(1, color=_TRAINING, linestyle="--", label="training")
    for one, colour, marker in zip(found.schedules, _COLOURS, _MARKERS, strict=False):
        style = {
            "color": colour,
            "marker": marker,
            "markersize": 4.0,
            "linewidth": 1.5,
            "label": _signs(one.name),
        }
        for axes, values in ((norms, one.norms), (ratios, one.ratios), (deltas, one.deltas)):
            axes.plot(steps, values, **style)
    _finish(norms, "Predicted noise", "mean ‖ε‖₂ of an image", found.nfe)
    _finish(ratios, "Sampling against training", "‖ε‖₂ in sampling / in training", found.nfe)
    _finish(deltas, "Exposure bias of the states", _signs("δ_t (squared Fréchet distance)"), found.nfe)
    deltas.set_yscale(
        "log" if min(found.floor) > 0 and all(min(one.deltas) > 0 for one in found.schedules) else "linear"
    )
    figure.suptitle(f"{found.model}, {found.solver}, NFE {found.nfe}, {found.images:,} images", fontsize=11)
    return figure


def _signs(text: str) -> str:
    """Indices as indices."""
    return text.replace("λ_t", r"$\lambda_t$").replace("δ_t", r"$\delta_t$")


def _finish(axes: "Axes", title: str, label: str, nfe: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel("evaluation t (sampling goes from left to right)")
    axes.set_ylabel(label)
    axes.set_xlim(nfe - 1 + 0.03 * nfe, -0.03 * nfe)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure; the file's ending says how. Raises InputError."""
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # an ending that it does not know
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
