"""search.sensitivity: ranges of a distance whose curve is known."""

import pytest

from search import sensitivity


def test_the_surface_gives_the_ranges_of_the_known_curve(store, play):
    job = play(store, "adaptive")
    mean, k = sensitivity.measured(job, store.evaluations(job.id))
    assert (mean.source, k.source) == ("surface", "surface")
    assert mean.best == pytest.approx(1.012, abs=3e-4)
    assert k.best == pytest.approx(0.0006, abs=3e-4)
    least = 30 + 2000 / mean.images
    for found, best, curve in ((mean, 1.012, 2e4), (k, 0.0006, 2e5)):
        for one in found.ranges:
            away = (one.loss * least / curve) ** 0.5
            if one.high is not None:
                assert one.high == pytest.approx(best + away, abs=0.1 * away)
            if one.low is not None:
                assert one.low == pytest.approx(best - away, abs=0.1 * away)
    assert mean.ranges[0].low is not None


def test_the_papers_points_give_ranges_between_them_and_none_beyond(store, play):
    job = play(store, "paper")
    evaluations = store.evaluations(job.id)
    mean, k = sensitivity.measured(job, evaluations)
    assert (mean.source, k.source, mean.images) == ("points", "points", 5000)
    assert mean.best == pytest.approx(1.012, abs=1e-3)
    least = min(e.distance for e in evaluations if e.k == 0 and e.seed == job.seed)
    low = mean.ranges[1].low  # 5 % below the best b
    assert low == pytest.approx(1.012 - (0.05 * least / 2e4) ** 0.5, abs=1e-3)
    tried = [e.mean for e in evaluations if e.k == 0]
    for one in mean.ranges:
        assert one.high is None or one.high <= max(tried)


def test_a_line_that_falls_up_to_its_end_has_the_window_that_is_seen_of_it():
    falling = {0.0: 2.5, 0.02: 2.3, 0.06: 2.2}
    edge, half = sensitivity._flank(falling)
    assert (edge, half) == (0.06, pytest.approx(0.04 * 0.066 / 0.1))
    assert sensitivity._flank({0.0: 2.24, 0.06: 2.2}) is None


def test_without_a_bracket_nothing_is_said(store, play):
    job = play(store, "adaptive")
    assert sensitivity.measured(job, store.evaluations(job.id)[:1]) == ()
    assert sensitivity.surface(job, store.evaluations(job.id)[:3]) is None
