"""A quadratic surface through noisy distances that share their random numbers: where its minimum is, and how sure.

Generalised least squares over all rungs of all trials. The noise of two distances is correlated, and their
influences say how much; a trial of more images is a better one. Only distances of equally many images are compared
with each other: each rung has an offset of its own, so a bias that depends on the number of images cancels.

Knows nothing of what the coordinates mean or which point is tried next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from objectives.paired import BLOCK, Influence
from search.strategies.line import RISE

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

# How far the true surface may be off the quadratic one, as a share of the rise above the least value.
_MISFIT = 0.05
_CUBIC = 0.4  # a cubic coefficient is expected within this share of the quadratic one, in half widths
_FITS = 6
_FLOOR = 1e-4  # the same near the minimum, as a share of the distance
_CROSS = (
    0.3  # a mixed second derivative is expected within this share of the geometric mean of the two pure ones
)


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
    expected to be lost because the true minimum is elsewhere: tr(curve·covariance). free: the coordinates that no
    bound holds at the minimum.
    """

    centre: Vector
    slope: Vector
    curve: Matrix
    minimum: Vector
    covariance: Matrix
    regret: float
    free: tuple[int, ...]

    def value(self, x: Vector) -> float:
        """The distance at x minus that at the centre."""
        away = np.asarray(x) - self.centre
        return float(self.slope @ away + away @ self.curve @ away)

    def least(self, low: Vector, high: Vector) -> Vector:
        """Where the surface is least inside other bounds."""
        away, _ = _minimum(self.slope, self.curve, low - self.centre, high - self.centre)
        return self.centre + away


def fit(samples: Sequence[Sample], centre: Vector, widths: Vector, low: Vector, high: Vector) -> Surface | None:
    """The surface through the samples; None where they do not determine one with a minimum.

    centre: about where the minimum is. widths [p]: how far from there along each coordinate the distance has risen
    noticeably; the scale of the problem. low, high [p]: bounds of the minimum, infinite where there are none.

    Cubic terms along the coordinates take up that curves are steeper on one side; the surface is their expansion at
    the minimum, which is found by fitting again around the one found before.
    """
    found = None
    for _ in range(_FITS):
        next_one = _fit(samples, centre, widths, low, high)
        if next_one is None:
            break
        found = next_one
        step = np.clip(found.minimum - centre, -widths, widths)
        centre = centre + step
        if (np.abs(step) < 1e-3 * widths).all():
            break
    return found


def _fit(samples: Sequence[Sample], centre: Vector, widths: Vector, low: Vector, high: Vector) -> Surface | None:
    p = len(centre)
    observed = [(i, n) for i, sample in enumerate(samples) for n in sample.rungs]
    shared = {n for n in {n for _, n in observed} if sum(m == n for _, m in observed) > 1}
    observed = [(i, n) for i, n in observed if n in shared and math.isfinite(samples[i].rungs[n])]
    if len(observed) < 2 * p + len(shared):
        return None
    rungs = sorted({n for _, n in observed})
    y = np.array([samples[i].rungs[n] for i, n in observed])
    u = np.array([(samples[i].position - centre) / widths for i, _ in observed])
    pairs = [(a, b) for a in range(p) for b in range(a, p)]
    pure = [pairs.index((a, a)) for a in range(p)]
    design = np.column_stack(
        [
            *(np.array([float(n == rung) for _, n in observed]) for rung in rungs),
            *(u[:, a] for a in range(p)),
            *(u[:, a] * u[:, b] for a, b in pairs),
            *(u[:, a] ** 3 for a in range(p)),
        ]
    )
    noise = _noise(samples, observed, y)
    quadratic = len(rungs) + p
    cubic = quadratic + len(pairs)
    # The pure second derivatives have no prior; they are the scale of that of the mixed ones and the cubic terms,
    # so they are estimated first with those held near 0.
    scale = np.full(p, max(RISE * float(np.abs(y).min()), 1e-12))
    beta = covariance = None
    for _ in range(2):
        prior = np.zeros(design.shape[1])
        for j, (a, b) in enumerate(pairs):
            if a != b:  # u_a·u_b has the coefficient 2·H_ab, and |H_ab| < sqrt(H_aa·H_bb) where there is a minimum
                prior[quadratic + j] = 1 / (2 * _CROSS * math.sqrt(scale[a] * scale[b])) ** 2
        prior[cubic:] = 1 / (_CUBIC * scale) ** 2
        beta, covariance = _solve(design, noise, y, prior)
        if beta is None or covariance is None:
            return None
        scale = beta[quadratic:cubic][pure]
        if (scale <= 0).any():
            return None
    assert beta is not None
    assert covariance is not None
    theta = beta[len(rungs) : cubic]
    cov = covariance[len(rungs) : cubic, len(rungs) : cubic]
    slope, curve = _unpacked(theta, p, pairs)
    if np.linalg.eigvalsh(curve)[0] <= 0:
        return None
    least, free = _minimum(slope, curve, (low - centre) / widths, (high - centre) / widths)
    inside = list(free)
    jacobian = np.zeros((p, len(theta)))
    for j in range(len(theta)):
        step = 1e-4 * (abs(theta[j]) + math.sqrt(cov[j, j]) + 1e-12)
        moved = theta.copy()
        moved[j] += step
        elsewhere = _unconstrained(*_unpacked(moved, p, pairs), least, free)
        jacobian[inside, j] = ((elsewhere - least) / step)[inside]
    spread = jacobian @ cov @ jacobian.T
    return Surface(
        centre=centre,
        slope=slope / widths,
        curve=curve / np.outer(widths, widths),
        minimum=centre + widths * least,
        covariance=spread * np.outer(widths, widths),
        regret=float(np.trace(curve @ spread)),
        free=free,
    )


def _noise(samples: Sequence[Sample], observed: Sequence[tuple[int, int]], y: Vector) -> Matrix:
    """The covariance of the observations: of sampling, from the influences, and of the surface not being quadratic."""
    m = len(samples)
    per_image = np.zeros((m, m))
    for i in range(m):
        for j in range(i, m):
            one, other = samples[i].influence, samples[j].influence
            if one is None or other is None:
                continue
            common = min(len(one), len(other))
            if common > 1:
                both = np.cov(one[:common].astype(np.float64), other[:common].astype(np.float64))
                per_image[i, j] = per_image[j, i] = BLOCK * both[0, 1]
    values, vectors = np.linalg.eigh(
        per_image
    )  # entries from different numbers of blocks: not quite a covariance
    per_image = (vectors * values.clip(min=0)) @ vectors.T
    least = {n: min(value for (_, k), value in zip(observed, y, strict=True) if k == n) for _, n in observed}
    rise = np.zeros(m)
    for (i, n), value in zip(observed, y, strict=True):
        rise[i] = max(rise[i], value - least[n])
    misfit = _MISFIT * rise + _FLOOR * np.abs(y).min()
    noise = np.zeros((len(observed), len(observed)))
    for a, (i, n) in enumerate(observed):
        for b, (j, k) in enumerate(observed):
            noise[a, b] = per_image[i, j] / max(n, k) + (misfit[i] ** 2 if i == j else 0.0)
    return noise + np.diag(np.full(len(observed), (_FLOOR * np.abs(y).min()) ** 2))


def _solve(design: Matrix, noise: Matrix, y: Vector, prior: Vector) -> tuple[Vector | None, Matrix | None]:
    """Coefficients and their covariance, with independent Gaussian priors of mean 0 and precision `prior`."""
    try:
        whitened = np.linalg.solve(noise, np.column_stack([design, y]))
        precision = design.T @ whitened[:, :-1] + np.diag(prior)
        covariance = np.linalg.inv(precision)
    except np.linalg.LinAlgError:
        return None, None
    if not np.isfinite(covariance).all() or np.linalg.cond(precision) > 1e14:
        return None, None
    return covariance @ (design.T @ whitened[:, -1]), covariance


def _unpacked(theta: Vector, p: int, pairs: Sequence[tuple[int, int]]) -> tuple[Vector, Matrix]:
    curve = np.zeros((p, p))
    for value, (a, b) in zip(theta[p:], pairs, strict=True):
        curve[a, b] = curve[b, a] = value if a == b else value / 2
    return theta[:p], curve


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
