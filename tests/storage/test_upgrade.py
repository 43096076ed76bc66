import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

from samplers.errors import InputError, LamtuneError
from storage import upgrade
from storage.connection import make_engine, parse
from storage.store import check_store, open_store
from storage.tables import Base

ROOT = Path(__file__).parents[2]


def test_opening_an_empty_database_makes_our_tables_and_only_them(url: str) -> None:
    open_store(url).close()
    engine = make_engine(parse(url))
    assert set(inspect(engine).get_table_names()) == {*Base.metadata.tables, upgrade.VERSION_TABLE}
    with engine.connect() as connection:
        assert upgrade.version(connection) == upgrade.HEAD
    engine.dispose()


def test_the_migrations_make_what_the_classes_say_and_ignore_optunas_tables(url: str) -> None:
    with open_store(url) as store:
        store.optuna_storage().engine.dispose()
    engine = make_engine(parse(url))
    with engine.begin() as connection:
        assert inspect(connection).has_table("alembic_version")
        config = upgrade.alembic_config(connection)
        command.check(config)  # raises for any difference
        assert ScriptDirectory.from_config(config).get_heads() == [upgrade.HEAD]
    engine.dispose()


def test_a_database_of_the_first_version_keeps_its_evaluations_with_their_jobs_seed(url: str) -> None:
    engine = make_engine(parse(url))
    with engine.execution_options(write=True).begin() as connection:
        command.upgrade(upgrade.alembic_config(connection), "0001")
        connection.execute(
            text("INSERT INTO lamtune_evaluators VALUES (1, 'e', 'digits', 8, 'r', '{}')"),
        )
        now = "'2026-01-01 00:00:00'"
        connection.execute(
            text(
                "INSERT INTO lamtune_jobs VALUES (1, 's', 'm', 'f', 'd', 'ddpm', '{}', 4, 'paper', 100, 77, '{}', 1, "
                f"'finished', NULL, {now}, {now}, {now})"
            )
        )
        connection.execute(
            text(
                "INSERT INTO lamtune_evaluations VALUES (1, 1, 0, 'coarse', 0, 1.01, 1.01, '[1.01,1.01,1.01,1.01]', "
                f"'complete', 100, 5.5, '{{\"100\": 5.5}}', 400, 1.5, NULL, {now}, {now})"
            )
        )
    engine.dispose()
    with open_store(url) as store:
        (evaluation,) = store.evaluations(1)
        assert (evaluation.seed, evaluation.distance, evaluation.rungs) == (77, 5.5, {100: 5.5})
        assert (evaluation.parameters, evaluation.influence, evaluation.gain) == ({}, b"", None)
        assert store.job(1).confirm == 0
        best = store.best("m", "d", 4)
        assert (best.distance, best.confirmed, best.significant) == (5.5, False, None)


def test_a_database_of_a_newer_lamtune_is_refused_and_left_alone(url: str) -> None:
    open_store(url).close()
    engine = create_engine(parse(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE lamtune_version SET version_num = '9999'"))
    with pytest.raises(InputError, match=r"9999.*upgrade lamtune"):
        open_store(url)
    with engine.connect() as connection:
        assert upgrade.version(connection) == "9999"
    engine.dispose()


def test_many_may_open_an_empty_database_at_once(url: str) -> None:
    barrier = Barrier(6)

    def opened(_: int) -> bool:
        barrier.wait()
        with open_store(url) as store:
            return store.jobs() == ()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(opened, range(6))) == [True] * 6


def test_one_process_may_make_several_stores_at_once(tmp_path: Path) -> None:
    barrier = Barrier(6)

    def opened(i: int) -> bool:
        barrier.wait()
        with open_store(f"sqlite:///{tmp_path}/{i}.db") as store:
            return store.jobs() == ()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(opened, range(6))) == [True] * 6


def test_neither_importing_nor_reopening_the_store_loads_what_is_heavy(sqlite_url: str) -> None:
    open_store(sqlite_url).close()
    code = """if True:
        import sys, storage
        storage.open_store(sys.argv[1]).close()
        print(*sorted({"torch", "optuna", "ray", "alembic", "psycopg", "numpy"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, sqlite_url], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == []


def test_a_check_says_what_an_upgrade_would_do_and_changes_nothing(url: str) -> None:
    with pytest.raises(LamtuneError, match="does not exist yet|schema version none"):
        check_store(url)
    engine = make_engine(parse(url))
    with engine.execution_options(write=True).begin() as connection:
        assert not inspect(connection).get_table_names()
        command.upgrade(upgrade.alembic_config(connection), "0001")
    with pytest.raises(
        LamtuneError, match=f"0001 and this lamtune uses {upgrade.HEAD}: `lamtune store upgrade`"
    ):
        check_store(url)
    with engine.begin() as connection:
        assert upgrade.version(connection) == "0001"
    open_store(url).close()
    assert check_store(url) == upgrade.HEAD
    with engine.execution_options(write=True).begin() as connection:
        connection.execute(text(f"UPDATE {upgrade.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(InputError, match="upgrade lamtune"):
        check_store(url)
    engine.dispose()


def test_a_check_makes_no_file(sqlite_url: str) -> None:
    with pytest.raises(LamtuneError, match="does not exist yet"):
        check_store(sqlite_url)
    assert not Path(str(parse(sqlite_url).database)).exists()
