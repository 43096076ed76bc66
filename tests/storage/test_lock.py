"""storage.lock: one search per SQLite file, and what it does not keep anybody from."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

from samplers.errors import InputError
from storage import open_store

HOLDER = """
import subprocess, sys, time
from storage import open_store
with open_store(sys.argv[1]) as store, store.only_writer():
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(url):
    """Another process that writes to the store, with a child that outlives it."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True, cwd=root
    )
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    subprocess.run(["kill", "-9", str(child)], check=True)


def test_a_second_search_on_sqlite_is_sent_to_postgresql_and_may_follow_a_kill_9(held, url):
    with open_store(url) as store:
        if url.startswith("postgresql"):
            with store.only_writer():
                return
        with (
            pytest.raises(InputError, match=rf"process {held.pid} on .*--store postgresql://"),
            store.only_writer(),
        ):
            pytest.fail("two processes hold it")
        assert store.jobs() == ()  # reading is free
        held.send_signal(signal.SIGKILL)
        held.wait()
        for _ in range(2):
            with store.only_writer():
                pass


def test_a_folder_in_which_no_lock_can_be_made_is_named(sqlite_url):
    with open_store(sqlite_url) as store:
        Path(f"{make_url(sqlite_url).database}.lock").mkdir()
        with pytest.raises(InputError, match=r"\.lock: Is a directory"), store.only_writer():
            pytest.fail("a folder is no lock")
