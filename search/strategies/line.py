"""Explores a distance along one coordinate: from a start to a window in which it is a parabola.

A pure function of the values that are known. Values are those of equally many images with the same random numbers,
so their noise is smooth along the line and a parabola through few of them is meaningful. Knows nothing of what the
coordinate is, or of error bars: those are the surface's matter (`surface`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

RISE = 0.03  # a window reaches as far as the distance rises by this share of its least value
_GROWTH = 2.0  # each step beyond what is known, in steps before it
_NEAR, _FAR = 0.3, 2.0  # where flanking values must lie, in half windows from the vertex
_MOST = 14  # values per line; more than any curve with one minimum has needed


def window(values: Mapping[float, float]) -> tuple[float, float] | None:
    """Vertex and half width of the parabola through the best value and its neighbours; None without a bracket.

    The half width is where the parabola has risen by RISE of its least value.
    """
    best = _best(values)
    below = max((x for x in values if x < best), default=None)
    above = min((x for x in values if x > best), default=None)
    if below is None or above is None:
        return None
    fall, rise = values[below] - values[best], values[above] - values[best]
    if not math.isfinite(fall + rise):
        return None
    down, up = best - below, above - best
    curve = (fall / down + rise / up) / (down + up)
    if curve <= 0:
        return None
    vertex = best + (fall / down * up - rise / up * down) / (2 * curve * (down + up))
    return vertex, math.sqrt(RISE * max(abs(values[best]), 1e-12) / curve)


def bracket(
    values: Mapping[float, float], start: float, step: float, low: float, high: float
) -> float | None:
    """Where to measure next, inside [low, high] and new; None when the best value has others on either side.

    values: position → distance, +inf where there is none; it holds `start`. step: the first one, signed by where the
    minimum is expected; its size should change the distance noticeably.
    """
    if len(values) >= _MOST:
        return None
    best = _best(values)
    if not math.isfinite(values[best]):
        return None
    below = max((x for x in values if x < best), default=None)
    above = min((x for x in values if x > best), default=None)
    sides = (
        (above, best - below if below is not None else None, high, 1),
        (below, above - best if above is not None else None, low, -1),
    )
    for neighbour, passed, limit, sign in sides if step > 0 else sides[::-1]:
        if neighbour is None and best != limit:
            reach = _GROWTH * passed if passed is not None and best != start else abs(step)
            return _new(values, min(best + reach, limit) if sign > 0 else max(best - reach, limit))
    for neighbour in (above, below):
        # Beyond a value that is not there lies nothing to fit: come nearer, but not for ever.
        if neighbour is not None and not math.isfinite(values[neighbour]):
            if abs(neighbour - best) <= abs(step) / 8:
                return None
            return _new(values, (best + neighbour) / 2)
    return None


def ask(values: Mapping[float, float], start: float, step: float, low: float, high: float) -> float | None:
    """The same, and on until the window is known, or the line is exhausted."""
    x = bracket(values, start, step, low, high)
    found = window(values)
    if x is not None or found is None or len(values) >= _MOST:
        return x
    vertex, half = found
    inside = [(x - vertex) / half for x in values if math.isfinite(values[x])]
    wanted = []
    if not any(abs(d) <= 0.5 for d in inside):
        wanted.append(vertex)
    if not any(-_FAR <= d <= -_NEAR for d in inside):
        wanted.append(vertex - half)
    if not any(_NEAR <= d <= _FAR for d in inside):
        wanted.append(vertex + half)
    for x in wanted:
        if low <= x <= high:
            return _new(values, rounded(x, half))
    return None


def finite(values: Mapping[float, float], low: float, high: float) -> tuple[float, float]:
    """The part of [low, high] around the best value beyond which a value is not there."""
    best = _best(values)
    gone = [x for x in values if not math.isfinite(values[x])]
    there = [x for x in values if math.isfinite(values[x])] or [best]
    above, below = (
        min((x for x in gone if x > best), default=None),
        max((x for x in gone if x < best), default=None),
    )
    return (
        low if below is None else min(x for x in there if x > below),
        high if above is None else max(x for x in there if x < above),
    )


def _best(values: Mapping[float, float]) -> float:
    return min(values, key=lambda x: (values[x], abs(x)))


def _new(values: Mapping[float, float], x: float) -> float | None:
    return None if any(abs(x - known) < 1e-12 for known in values) else x


def rounded(x: float, half: float) -> float:
    """x as people write it: to a hundredth of the half width or coarser, a power of ten."""
    return round(x, -math.floor(math.log10(half / 10)))
