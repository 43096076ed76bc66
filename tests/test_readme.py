"""The README: its commands are commands of the program, its job file is a job, its files exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from search.cli import main
from search.spec import parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


def code(language):
    return [text for kind, text in BLOCKS if kind == language]


COMMANDS = [
    line.partition("#")[0] for text in code("sh") for line in text.splitlines() if line.startswith("lamtune ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_program_takes(command):
    _, name, *words = shlex.split(command)
    main.commands[name].make_context(name, words)  # raises for unknown options and missing arguments


def test_there_are_commands_to_check():
    assert {shlex.split(c)[1] for c in COMMANDS} >= {"submit", "best", "jobs", "dashboard", "reference"}


def test_the_job_files_are_jobs(tmp_path):
    whole, model = (yaml.safe_load(text) for text in code("yaml"))
    spec = parse(whole, "README.md", tmp_path)
    assert [s.nfe for s in spec.sampling] == [20, 50]
    parse({**whole, **model}, "README.md", tmp_path)


def test_linked_files_exist_and_make_targets_are_targets():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (demo|test|lint|bench)\b", TEXT):
        assert f"\n{target}:" in makefile
