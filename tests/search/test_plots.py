"""search.plots: what the pictures of a search show, and that only what compares is joined."""

import itertools
from dataclasses import replace

import pytest

from search import plots, sensitivity
from storage import CONFIRM


@pytest.fixture(params=["adaptive", "paper"])
def searched(request, store, play):
    job = play(store, request.param)
    return job, store.evaluations(job.id)


def test_every_search_has_its_five_plots(searched):
    assert [plot.key for plot in plots.of_job(*searched)] == [
        "distance-over-mean",
        "distance-over-k",
        "schedules",
        "distance-over-images",
        "cost",
    ]


def test_a_panel_holds_distances_of_one_image_count_and_seed_and_lines_join_what_differs_in_one_coordinate(
    searched,
):
    job, evaluations = searched
    at = {}  # (images, whether fresh) → what was measured there
    for e in evaluations:
        for images, distance in e.rungs.items():
            at.setdefault((images, e.seed != job.seed), set()).add(distance)
    for axis in (0, 1):
        plot = plots.distances(job, evaluations, axis, None)
        assert len({panel.title for panel in plot.panels}) == len(plot.panels) >= 1
        for panel in plot.panels:
            images = int(panel.title.split()[0].replace(",", ""))
            points = {y for series in panel.series for y in series.y}
            assert points <= at[images, "fresh" in panel.title]
            for series in panel.series:
                if series.joined:
                    others = {
                        round(sensitivity.position(e)[1 - axis], 9)
                        for e in evaluations
                        if e.rungs.get(images) in series.y and sensitivity.position(e)[axis] in series.x
                    }
                    assert len(others) == 1
                    assert list(series.x) == sorted(series.x)
    fresh = [p for p in plots.distances(job, evaluations, 0, None).panels if "fresh" in p.title]
    assert len(fresh) == 1
    assert not any(series.joined for series in fresh[0].series)


def test_numbers_of_the_solver_have_a_panel_each_where_most_values_were_tried(searched):
    job, evaluations = searched
    assert plots.parameters(job, evaluations).panels == ()
    mine = [e for e in evaluations if e.seed == job.seed]
    first = min(mine[0].rungs)
    tried = [
        replace(e, parameters={"eta": 0.125 * e.number, "S_noise": 1.003} if e.number else {}) for e in mine
    ]
    eta, s_noise = plots.parameters(replace(job, sampling={"S_noise": 1.0}), tried).panels
    assert eta.title == f"eta, {first:,} images"
    at = {x: y for series in eta.series for x, y in zip(series.x, series.y, strict=True)}
    assert at == {0.125 * e.number: e.rungs[first] for e in mine if first in e.rungs}
    assert {x for series in s_noise.series for x in series.x} == {1.0, 1.003}
    assert any("eta 0.125" in text for series in eta.series for text in series.texts)
    assert [plot.key for plot in plots.of_job(job, tried)].count("distance-over-parameters") == 1


def test_error_bars_are_those_of_the_difference_to_the_lowest(searched):
    panel = plots.distances(*searched, 0, None).panels[0]
    dots = [series for series in panel.series if series.markers]
    bars = list(itertools.chain(*(zip(series.y, series.errors, strict=True) for series in dots)))
    lowest = min(bars)
    assert lowest[1] == 0
    for y, error in bars:
        if y != lowest[0]:
            # Their own noise, 1 per block of 5 images; the common one of 20 cancels.
            images = int(panel.title.split()[0].replace(",", ""))
            assert error == pytest.approx((2 / (images / 5)) ** 0.5, rel=0.3)


def test_the_fit_goes_through_the_known_minimum(store, play):
    job = play(store, "adaptive")
    evaluations = store.evaluations(job.id)
    plot = plots.distances(job, evaluations, 0, sensitivity.surface(job, evaluations))
    fits = [s for panel in plot.panels for s in panel.series if s.look == "fit"]
    assert fits
    for fit in fits:
        assert fit.x[fit.y.index(min(fit.y))] == pytest.approx(1.012, abs=5e-4)


def test_the_schedules_are_those_of_the_confirmed_winners(searched):
    job, evaluations = searched
    (panel,) = plots.schedules(evaluations, job).panels
    assert panel.series[0].y == (1.0,) * job.nfe
    confirmed = {e.lambdas for e in evaluations if e.phase == CONFIRM}
    assert {series.y for series in panel.series} <= confirmed
    assert any(series.name.startswith("linear") for series in panel.series)


def test_lambda_1_with_other_numbers_of_the_solver_is_a_schedule_that_was_found_and_no_baseline(searched):
    job, evaluations = searched
    (one,) = [e for e in evaluations if e.is_baseline and e.phase == CONFIRM]
    with_eta = replace(one, parameters={"eta": 0.5})
    (panel,) = plots.schedules([with_eta], job).panels
    assert [series.name for series in panel.series] == ["λ = 1", "uniform, λ = 1, eta 0.5"]
    (panel,) = plots.rungs(job, [one, with_eta]).panels
    assert [series.look for series in panel.series] == ["baseline", "first"]


def test_a_trial_is_a_line_over_its_own_images_and_those_without_all_of_them_are_marked(searched):
    job, evaluations = searched
    plot = plots.rungs(job, evaluations)
    lines = [series for panel in plot.panels for series in panel.series]
    assert len(lines) == len(evaluations)
    by_rungs = {tuple(e.rungs.values()): e for e in evaluations}
    for line in lines:
        e = by_rungs[line.y]
        if line.look != "baseline":
            assert (line.look == "lost") == (e.state == "pruned")


def test_the_cost_is_all_network_evaluations(searched):
    (panel,) = plots.cost(*searched).panels
    assert sum(s.x[0] for s in panel.series) == sum(e.network_evaluations for e in searched[1])


def test_a_search_without_trials_has_no_plots(store, play):
    job = play(store)
    assert plots.of_job(job, ()) == ()
