"""The fit: exact where there is no noise, and as sure of itself as it may be where there is."""

import numpy as np
import pytest

from objectives.paired import BLOCK
from search.strategies.surface import Sample, Surface, fit

CENTRE, WIDTHS = np.array([1.02, 0.003]), np.array([0.009, 0.003])
LOW, HIGH, DOUBT = np.full(2, -np.inf), np.full(2, np.inf), np.full(2, 0.7)
CURVE = np.array([[1.2, 0.2], [0.2, 0.8]]) / np.outer(WIDTHS, WIDTHS)
STAR = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7)]


def distance(x: np.ndarray, least: np.ndarray) -> float:
    return float(33 + (x - least) @ CURVE @ (x - least))


def test_a_quadratic_surface_without_noise_is_found() -> None:
    least = CENTRE + WIDTHS * [0.3, -0.2]
    samples = [Sample(x, {500: distance(x, least)}, None) for x in CENTRE + WIDTHS * np.array(STAR)]
    found = fit(samples, CENTRE, WIDTHS, LOW, HIGH, DOUBT)
    assert found is not None
    assert (found.minimum - least) / WIDTHS == pytest.approx([0, 0], abs=0.05)
    assert found.curve * np.outer(WIDTHS, WIDTHS) == pytest.approx(
        np.array([[1.2, 0.2], [0.2, 0.8]]), abs=0.15
    )
    assert found.value(least + WIDTHS) - found.value(least) == pytest.approx(2.4, abs=0.3)


def test_a_constant_that_depends_on_the_images_moves_nothing() -> None:
    least = CENTRE + WIDTHS * [0.3, -0.2]
    positions = CENTRE + WIDTHS * np.array(STAR)

    def found(bias: float) -> Surface:
        rungs = [
            {500: distance(x, least) + bias} | ({2000: distance(x, least)} if i % 2 else {})
            for i, x in enumerate(positions)
        ]
        samples = [Sample(x, r, None) for x, r in zip(positions, rungs, strict=True)]
        surface = fit(samples, CENTRE, WIDTHS, LOW, HIGH, DOUBT)
        assert surface is not None
        return surface

    # The distance at 500 images is also the scale of what is expected, so not to the last digit.
    assert (found(3.0).minimum - found(0.0).minimum) / WIDTHS == pytest.approx([0, 0], abs=0.03)


def test_the_minimum_keeps_to_the_bounds_and_the_other_coordinate_is_solved_again() -> None:
    least = CENTRE + WIDTHS * [0.3, -0.2]
    samples = [Sample(x, {500: distance(x, least)}, None) for x in CENTRE + WIDTHS * np.array(STAR)]
    high = np.array([np.inf, CENTRE[1] - 0.8 * WIDTHS[1]])
    found = fit(samples, CENTRE, WIDTHS, LOW, high, DOUBT)
    assert found is not None
    assert found.minimum[1] == pytest.approx(high[1])
    # 1.2·u + 0.2·v = 0 at v = −0.6
    assert (found.minimum[0] - least[0]) / WIDTHS[0] == pytest.approx(0.1, abs=0.15)
    assert found.covariance[1, 1] == 0


def test_one_trial_determines_nothing() -> None:
    assert fit([Sample(CENTRE, {500: 33.0}, None)], CENTRE, WIDTHS, LOW, HIGH, DOUBT) is None
    assert fit([], CENTRE, WIDTHS, LOW, HIGH, DOUBT) is None


def test_a_concave_measurement_still_gives_a_minimum_near_by() -> None:
    samples = [Sample(x, {500: 66 - distance(x, CENTRE)}, None) for x in CENTRE + WIDTHS * np.array(STAR)]
    found = fit(samples, CENTRE, WIDTHS, CENTRE - 5 * WIDTHS, CENTRE + 5 * WIDTHS, DOUBT)
    assert found is not None
    assert (np.linalg.eigvalsh(found.curve) > 0).all()
    assert (np.abs(found.minimum - CENTRE) <= 5 * WIDTHS).all()


def test_the_regret_is_what_is_lost_over_many_noises() -> None:
    least = CENTRE + WIDTHS * [0.3, -0.2]
    rng = np.random.default_rng(0)
    lost, expected, coverage = [], [], []
    for _ in range(200):
        slopes = rng.normal(size=(2, 1000 // BLOCK)) * np.sqrt(4 * 0.09 * 1000 / BLOCK)
        samples = []
        for u in STAR:
            x = CENTRE + WIDTHS * np.array(u)
            influence = (np.array(u) @ slopes).astype(np.float32)
            samples.append(Sample(x, {1000: distance(x, least) + float(influence.mean())}, influence))
        found = fit(samples, CENTRE, WIDTHS, LOW, HIGH, DOUBT)
        assert found is not None
        lost.append(distance(found.minimum, least) - 33)
        expected.append(found.regret)
        off = found.minimum - least
        coverage.append(off @ np.linalg.inv(found.covariance) @ off < 5.99)  # 95 % of χ² with two degrees
    assert 0.6 < np.mean(lost) / np.mean(expected) < 1.3
    assert np.mean(coverage) > 0.9
