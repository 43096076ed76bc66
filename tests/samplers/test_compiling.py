"""samplers.compiling: a compiler may fail, and works once per host on the same."""

import threading
import warnings

import pytest
import torch

from samplers.compiling import Compiled, once_per_host


def failing(graph, inputs):
    raise RuntimeError("no compiler here")


def test_a_function_that_cannot_be_compiled_runs_as_it_is_and_says_so_once():
    double = Compiled(lambda x: 2 * x, "doubling", backend=failing)
    with pytest.warns(UserWarning, match="torch.compile failed for doubling.*slower"):
        assert double(torch.ones(3)).sum() == 6
    assert double.failed
    with warnings.catch_warnings(action="error"):
        assert double(torch.ones(3)).sum() == 6


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path))
    return tmp_path


def overlapping(what):
    """The most of four threads that are inside at the same time."""
    inside, most, entered = 0, 0, threading.Barrier(4)
    count = threading.Lock()

    def work(n):
        nonlocal inside, most
        entered.wait()
        with once_per_host(*what(n)):
            with count:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.05)
            with count:
                inside -= 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_one_compiles_while_others_wait_and_then_all_go_on(cache):
    with once_per_host("net", 500):
        assert not list(cache.rglob("*.done"))
    assert len(list(cache.rglob("*.done"))) == 1
    assert overlapping(lambda n: ("net", 500)) == 4


def test_who_comes_while_one_compiles_does_not_compile_too(cache):
    began, others = threading.Event(), []

    def late():
        began.wait()
        with once_per_host("net", 500):
            others.append(len(list(cache.rglob("*.done"))))

    thread = threading.Thread(target=late)
    thread.start()
    with once_per_host("net", 500):
        began.set()
        thread.join(0.2)
        assert not others
    thread.join()
    assert others == [1]


def test_different_networks_do_not_wait_for_each_other(cache):
    assert overlapping(lambda n: ("net", n)) == 4


def test_a_compilation_that_failed_is_tried_again_by_the_next(cache):
    with pytest.raises(ValueError, match="no"), once_per_host("net"):
        raise ValueError("no")
    assert not list(cache.rglob("*.done"))


def test_without_a_cache_nobody_waits(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "file"))
    assert overlapping(lambda n: ("net",)) == 4
