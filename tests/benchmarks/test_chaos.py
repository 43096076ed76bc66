"""benchmarks.chaos: what a search runs on dies by kill -9, and it finds the same."""

import pytest

from benchmarks import chaos
from benchmarks.servers import postgresql_programs


@pytest.mark.timeout(600)
def test_a_search_survives_a_worker_amid_its_measuring_a_node_and_the_database_and_finds_the_same():
    pytest.importorskip("psycopg")
    if not postgresql_programs():
        pytest.skip("no PostgreSQL programs found")
    search = {
        "images": 12_000,  # long enough for three kills: another search costs more than images do
        "rungs": [2000, 6000],
        "b": {"coarse": 0.1, "fine": 0.05},
        "k": {"start": 0, "stop": 0},
    }
    report = chaos.rounds(["node", "postgresql", "measuring"], search=search)
    assert sorted(one["kind"] for one in report["rounds"]) == ["measuring", "node", "postgresql"]
    for one in report["searches"]:
        assert one["evaluations"] > 4
        assert one["network_evaluations"] == pytest.approx(one["undisturbed_network_evaluations"], rel=0.5)
