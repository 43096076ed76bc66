"""A quadratic surface through noisy distances that share their random numbers: where its minimum is, and how sure.

Generalised least squares over all rungs of all trials. The noise of two distances is correlated, and their
influences say how much; a trial of more images is a better one. Only distances of equally many images are compared
with each other: each rung has an offset of its own, so a bias that depends on the number of images cancels.

Knows nothing of what the coordinates mean or which point is tried next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from objectives.paired import BLOCK, Influence
from search.strategies.line import RISE

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

# What is expected of a curve before it is measured, in half widths and shares of RISE of the least distance:
_SLOPE = 4.0  # a slope is 0, give or take: the minimum is within two half widths
_CROSS = 0.5  # a mixed second derivative is 0, give or take, in two dimensions
_LEAST = 0.2  # no curvature is believed to be less than this share of what is expected
_CUBIC = 0.3  # a cubic term along a coordinate is 0, give or take
_BEYOND = 0.4  # and what is left, as the fourth power
_FLOOR = 3e-3  # and near the minimum
_FITS = 3  # around the minimum of the one before


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What one trial measured: `position` [p], the distance at each of its rungs (images → distance), and its
    influence (see `objectives.paired`), None where that is not known."""

    position: Vector
    rungs: Mapping[int, float]
    influence: Influence | None


@dataclass(frozen=True, slots=True, eq=False)
class Surface:
    """distance(x) = constant + slope·(x − centre) + (x − centre)ᵀ curve (x − centre), with what is known of it.

    minimum: where it is least inside the bounds. covariance [p, p]: of `minimum`. regret: the distance that is
    expected to be lost because the true minimum is elsewhere: tr(curve·covariance).
    """

    centre: Vector
    slope: Vector
    curve: Matrix
    minimum: Vector
    covariance: Matrix
    regret: float

    def value(self, x: Vector) -> float:
        """The distance at x minus that at the centre."""
        away = np.asarray(x) - self.centre
        return float(self.slope @ away + away @ self.curve @ away)

    def least(self, low: Vector, high: Vector) -> Vector:
        """Where the surface is least inside other bounds."""
        away, _ = _minimum(self.slope, self.curve, low - self.centre, high - self.centre)
        return self.centre + away


def fit(
    samples: Sequence[Sample], centre: Vector, widths: Vector, low: Vector, high: Vector, doubt: Vector
) -> Surface | None:
    """The surface through the samples; None where no two can be compared.

    centre: about where the minimum is. widths [p]: how far from there along each coordinate the distance has risen
    noticeably; the scale of the problem, which says how large second derivatives are, give or take the share `doubt`
    [p]. low, high [p]: bounds of the minimum, infinite where there are none.

    What a surface is not expected to be is noise that grows with the distance from the centre, so the nearest samples
    count most; the minimum that they lead to becomes the next centre.
    """
    found = None
    per_image = BLOCK * _covariance([sample.influence for sample in samples])
    for _ in range(_FITS):
        next_one = _fit(samples, per_image, centre, widths, low, high, doubt)
        if next_one is None:
            break
        found = next_one
        step = np.clip(found.minimum - centre, -widths, widths)
        centre = centre + step
        if (np.abs(step) < 1e-3 * widths).all():
            break
    return found


def _fit(
    samples: Sequence[Sample],
    per_image: Matrix,
    centre: Vector,
    widths: Vector,
    low: Vector,
    high: Vector,
    doubt: Vector,
) -> Surface | None:
    p = len(centre)
    observed = [(i, n) for i, sample in enumerate(samples) for n in sample.rungs]
    counts = Counter(n for _, n in observed)
    observed = [(i, n) for i, n in observed if counts[n] > 1]
    rungs = sorted({n for _, n in observed})
    if len(observed) <= len(rungs):
        return None
    y = np.array([samples[i].rungs[n] for i, n in observed])
    u = np.array([(samples[i].position - centre) / widths for i, _ in observed])
    rows, columns = np.triu_indices(p)
    design = np.column_stack(
        [
            *(np.array([float(n == rung) for _, n in observed]) for rung in rungs),
            u,
            u[:, rows] * u[:, columns],
        ]
    )
    rise = max(RISE * float(np.abs(y).min()), 1e-12)
    pure = rows == columns
    expected = np.concatenate([np.zeros(len(rungs) + p), rise * pure])
    spread = np.concatenate(
        [
            np.full(len(rungs), np.inf),
            np.full(p, _SLOPE * rise),
            # u_a·u_b has the coefficient 2·H_ab. The more coordinates, the less there is for each pair.
            np.where(pure, doubt[rows], 2 * _CROSS / math.sqrt(max(p - 1, 1))) * rise,
        ]
    )
    noise = _noise(per_image, observed, u, rise)
    beta, covariance = _solve(design, noise, y, expected, spread)
    if beta is None or covariance is None:
        return None
    known = slice(len(rungs), len(rungs) + p + len(rows))
    slope, curve = beta[known][:p], np.zeros((p, p))
    curve[rows, columns] = beta[known][p:] * np.where(pure, 1, 0.5)
    curve[columns, rows] = curve[rows, columns]
    values, vectors = np.linalg.eigh(curve)
    curve = (vectors * values.clip(min=_LEAST * rise)) @ vectors.T
    least, free = _minimum(slope, curve, (low - centre) / widths, (high - centre) / widths)
    # The derivative of the minimum by the coefficients, from slope + 2·curve·u = 0 in the free coordinates.
    inside = list(free)
    inverse = np.zeros((p, p))
    inverse[np.ix_(inside, inside)] = np.linalg.inv(curve[np.ix_(inside, inside)])
    gradient = np.zeros((p, p + len(rows)))
    gradient[:, :p] = np.eye(p)
    for j, (a, b) in enumerate(zip(rows, columns, strict=True)):
        gradient[a, p + j] += least[b]
        gradient[b, p + j] += least[a]
    jacobian = -0.5 * inverse @ gradient
    spread = jacobian @ covariance[known, known] @ jacobian.T
    return Surface(
        centre=centre,
        slope=slope / widths,
        curve=curve / np.outer(widths, widths),
        minimum=centre + widths * least,
        covariance=spread * np.outer(widths, widths),
        regret=float(np.trace(curve @ spread)),
    )


def _noise(per_image: Matrix, observed: Sequence[tuple[int, int]], u: Vector, rise: float) -> Matrix:
    """The covariance of the observations: of sampling, and of the surface not being quadratic at u [N, p].

    The latter is the same at all rungs of a trial, and that of cubic terms is the same wherever a coordinate is, so
    the difference of two trials does not suffer from coordinates that they have in common.
    """
    which = np.array([i for i, _ in observed])
    images = np.array([n for _, n in observed])
    noise: Matrix = per_image[np.ix_(which, which)] / np.maximum.outer(images, images)
    cubic = (_CUBIC * rise) ** 2 * u**3 @ (u**3).T
    beyond = (_BEYOND * rise) ** 2 * (u**8).sum(1)
    floor = (_FLOOR * rise) ** 2
    same = which[:, None] == which
    noise += cubic + np.where(same, beyond + floor, 0.0) + np.eye(len(observed)) * floor
    return noise


def _covariance(influences: Sequence[Influence | None]) -> Matrix:
    """Of the block means of every two trials, over the blocks that both have; 0 where there are none."""
    m = len(influences)
    found: Matrix = np.zeros((m, m))
    blocks = [np.zeros(0) if influence is None else influence.astype(np.float64) for influence in influences]
    lengths = np.array([len(influence) for influence in blocks])
    shorter = np.minimum.outer(lengths, lengths)
    for length in sorted(set(lengths[lengths > 1])):
        long = [i for i in range(m) if lengths[i] >= length]
        both = np.atleast_2d(np.cov([blocks[i][:length] for i in long]))
        here = np.ix_(long, long)
        found[here] = np.where(shorter[here] == length, both, found[here])
    values, vectors = np.linalg.eigh(found)  # from different numbers of blocks: not quite a covariance
    found = (vectors * values.clip(min=0)) @ vectors.T
    return found


def _solve(
    design: Matrix, noise: Matrix, y: Vector, expected: Vector, spread: Vector
) -> tuple[Vector | None, Matrix | None]:
    """Coefficients and their covariance, with independent Gaussian priors (infinite spread: none)."""
    try:
        whitened = np.linalg.solve(noise, np.column_stack([design, y]))
        precision = design.T @ whitened[:, :-1] + np.diag(spread**-2.0)
        covariance = np.linalg.inv(precision)
    except np.linalg.LinAlgError:
        return None, None
    beta = covariance @ (design.T @ whitened[:, -1] + expected * spread**-2.0)
    if not np.isfinite(beta).all() or (np.diag(covariance) < 0).any():
        return None, None
    return beta, covariance


def _minimum(slope: Vector, curve: Matrix, low: Vector, high: Vector) -> tuple[Vector, tuple[int, ...]]:
    """The least point of slope·u + uᵀ curve u in a box, and the coordinates that are inside: a coordinate that
    leaves the box is put on its side, and the others are solved again."""
    p = len(slope)
    free = list(range(p))
    u = np.zeros(p)
    while free:
        u = _unconstrained(slope, curve, u, tuple(free))
        out = [a for a in free if not low[a] <= u[a] <= high[a]]
        if not out:
            break
        for a in out:
            u[a] = min(max(u[a], low[a]), high[a])
            free.remove(a)
    return u, tuple(free)


def _unconstrained(slope: Vector, curve: Matrix, u: Vector, free: tuple[int, ...]) -> Vector:
    """The least point where the coordinates that are not free stay as in u."""
    inside = list(free)
    held = [a for a in range(len(u)) if a not in free]
    answer = u.copy()
    right = -0.5 * slope[inside] - curve[np.ix_(inside, held)] @ u[held]
    answer[inside] = np.linalg.solve(curve[np.ix_(inside, inside)], right)
    return answer
