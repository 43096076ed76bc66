import os
import shutil
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest
from sqlalchemy import make_url

from samplers.errors import InputError
from storage.connection import default_url, parse, redacted, safe
from storage.store import open_store

SECRET = "hush-hush"


def shown(error: BaseException) -> str:
    """Everything that a log could show of an error: its chain, suppressed links too."""
    seen: list[str] = []
    link: BaseException | None = error
    while link is not None:
        seen += [str(link), repr(link), *traceback.format_exception(link)]
        link = link.__cause__ or link.__context__
    return "\n".join(seen)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may reach and write, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Lay down the right of root to write anything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    "url",
    [
        f"no url {SECRET}",
        f"postgresql://me:{SECRET}@host:port/name",
        f"postgresql://me:a@{SECRET}@host/name",
        f"postgresql://me:1/{SECRET}@x@host/name",
        f"postgresql://me:{SECRET}@host",
        f"mysql://me:{SECRET}@host/name",
        f"postgresql+psycopg2://me:{SECRET}@host/name",
        f"oracle+nosuch://me:{SECRET}@host/name?password={SECRET}",
        f"sqlite:///x.db?password={SECRET}",
        "sqlite://",
        "sqlite:///:memory:",
    ],
)
def test_a_url_that_is_no_store_is_refused_without_showing_its_secret(url: str) -> None:
    with pytest.raises(InputError) as caught:
        open_store(url)
    assert SECRET not in shown(caught.value)
    assert "sqlite:///" in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_means_psycopg_3(scheme: str) -> None:
    assert parse(f"{scheme}://me@host/name").drivername == "postgresql+psycopg"


def test_the_safe_url_shows_neither_the_password_nor_one_given_as_an_option() -> None:
    url = parse(
        f"postgresql://me:{SECRET}@host/name?password={SECRET}&sslpassword={SECRET}&application_name=x"
    )
    assert safe(url) == "postgresql+psycopg://me:***@host/name?application_name=x"


def test_a_driver_that_repeats_the_password_is_silenced() -> None:
    url = make_url("postgresql://me:a%40b c@host/name?sslpassword=tls")
    assert (
        redacted(url, ValueError("bad: a@b c\nor a%40b%20c or a%40b+c, tls")) == "bad: *** or *** or ***, ***"
    )


def test_a_wrong_password_is_never_shown(postgresql_url: str) -> None:
    with pytest.raises(InputError, match="password authentication failed") as caught:
        open_store(make_url(postgresql_url).set(password=SECRET).render_as_string(hide_password=False))
    assert SECRET not in shown(caught.value)
    assert "***" in str(caught.value)


def test_the_right_password_is_not_in_the_stores_texts(postgresql_url: str) -> None:
    password = make_url(postgresql_url).password
    assert password
    with open_store(postgresql_url) as store:
        assert password not in repr(store) + store.safe_url
        assert "***" in store.safe_url


def test_a_database_that_does_not_exist_is_an_input_error(postgresql_url: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_store(make_url(postgresql_url).set(database="nowhere").render_as_string(hide_password=False))


def test_a_host_that_does_not_answer_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"cannot be opened.*[Cc]onnection"):
        open_store("postgresql://me:secret@127.0.0.1:1/name")


def test_a_missing_psycopg_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"\[postgresql\]") as caught:
        open_store(f"postgresql://me:{SECRET}@host/name")
    assert SECRET not in shown(caught.value)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"folder {tmp_path}/none does not exist"):
        open_store(f"sqlite:///{tmp_path}/none/x.db")


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_store(f"sqlite:///{tmp_path}")


def test_a_file_of_something_else_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("something else, long enough for a header " * 100)
    with pytest.raises(InputError, match="not a database"):
        open_store(f"sqlite:///{tmp_path}/x.db")
    assert (tmp_path / "x.db").read_text().startswith("something else")


def test_a_file_that_may_not_be_written_is_an_input_error_on_opening(open_folder: Path) -> None:
    url = f"sqlite:///{open_folder}/x.db"
    open_store(url).close()
    (open_folder / "x.db").chmod(0o444)
    with as_nobody(), pytest.raises(InputError, match="readonly"):
        open_store(url)


def test_a_folder_that_may_not_be_written_is_an_input_error(open_folder: Path) -> None:
    (open_folder / "sub").mkdir(mode=0o555)
    with as_nobody(), pytest.raises(InputError, match="unable to open"):
        open_store(f"sqlite:///{open_folder}/sub/x.db")


def test_a_database_that_may_only_be_read_is_an_input_error_on_opening(postgresql_url: str) -> None:
    open_store(postgresql_url).close()
    only_read = make_url(postgresql_url).update_query_dict({"options": "-c default_transaction_read_only=on"})
    with pytest.raises(InputError, match="read-only transaction"):
        open_store(only_read.render_as_string(hide_password=False))


def test_the_environment_names_the_store_and_else_it_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAMTUNE_STORE", raising=False)
    assert default_url() == "sqlite:///lamtune.db"
    monkeypatch.setenv("LAMTUNE_STORE", "sqlite:///other.db")
    with open_store() as store:
        assert store.safe_url == "sqlite:///other.db"
    assert (tmp_path / "other.db").is_file()
    assert not (tmp_path / "lamtune.db").exists()


def test_a_new_file_that_another_connection_holds_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = Timer(0.3, other.rollback)
    release.start()
    with open_store(f"sqlite:///{file}") as store:
        assert not other.in_transaction
        assert store.jobs() == ()
    release.join()
    other.close()
