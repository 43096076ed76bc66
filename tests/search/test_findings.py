"""search.findings: what a report says is what the store holds."""

import json

import pytest

from search import findings
from storage import CONFIRM, NewJob


@pytest.fixture
def found(store, play):
    play(store, "adaptive", nfe=10)
    play(store, "paper")
    return findings.of_job(store, play(store, "adaptive").id)


def table(found, title):
    return next(one for one in found.tables if one.title.startswith(title))


def test_the_answer_names_the_schedule_the_gain_and_what_it_cost(found):
    best = found.best
    for part in (
        f"{best.k}·t",
        f"{best.distance:.4g}",
        f"{best.baseline_distance:.4g}",
        f"{best.trials} trials",
    ):
        assert part in found.answer
    assert "random numbers that the search has not seen" in found.answer


def test_the_result_compares_what_was_confirmed(found):
    result = table(found, "Result")
    confirmed = [e for e in found.evaluations if e.phase == CONFIRM]
    assert [row[0] for row in result.rows] == [findings.described(e) for e in confirmed]
    assert [row[1] for row in result.rows] == [f"{e.distance:.4f}" for e in confirmed]


def test_every_trial_every_nfe_and_the_whole_cost_are_there(found):
    assert len(table(found, "Trials").rows) == len(found.evaluations)
    assert [row[:3] for row in table(found, "All NFE").rows] == [
        ("ddpm", "10", "adaptive"),
        ("ddpm", "20", "adaptive"),
        ("ddpm", "20", "paper"),
    ]
    total = sum(e.network_evaluations for e in found.evaluations)
    assert table(found, "Cost").rows[-1][2] == f"{total:,}"


def test_the_lines_of_the_paper_mark_the_least(found):
    line = table(found, "Distance over λ")
    values = [float(cell.rstrip("*")) for cell in line.rows[0][1:]]
    (marked,) = [cell for cell in line.rows[0] if cell.endswith("*")]
    assert float(marked.rstrip("*")) == min(values)
    assert len(line.header) == len(line.rows[0])


def test_all_tables_are_rectangles(found):
    for one in found.tables:
        assert {len(row) for row in one.rows} == {len(one.header)}


def test_what_repeats_the_search_is_named(found):
    again = dict(table(found, "To do it again").rows)
    assert again["network (weights and options)"] == found.job.model_fingerprint
    assert again["evaluator (features and reference)"] == found.job.evaluator.fingerprint
    assert again["seed"] == "0"
    assert "torch 2" in again["versions"]


def test_the_plain_data_is_json_with_every_trial_and_no_bytes(found):
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert len(content["evaluations"]) == len(found.evaluations)
    assert content["best"]["k"] == found.best.k
    assert "influence" not in content["evaluations"][0]


def test_a_job_without_a_result_says_so(store, play):
    job = play(store)
    fields = {name: getattr(job, name) for name in NewJob.__dataclass_fields__}
    empty = store.create_job(NewJob(**fields | {"study_name": "x"}))
    found = findings.of_job(store, empty.id)
    assert found.best is None
    assert found.answer == f"Job {empty.id} is queued and has no result yet."
    assert [one.title for one in found.tables] == ["All NFE of this model and dataset", "To do it again"]
    assert found.plots == ()
