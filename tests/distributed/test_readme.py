"""Every command of the README is run; `test_starts.py` runs those of its table of starts."""

import re

import pytest

from tests.launch import ROOT, run_command

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if "=" not in line[:6]
]
MAKE_TARGETS = re.findall(r"`?\bmake ([a-z]+)\b", README)


def test_the_readme_is_short_and_all_its_commands_are_found():
    assert README.count("\n") <= 250
    assert len(COMMANDS) == 3
    assert set(MAKE_TARGETS) == {"train", "test"}


def test_every_linked_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 14
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("target", ["train", "test", "lint", "env"])
def test_make_has_the_target(target):
    run_command(["make", "-n", target]).check()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    run_command(["bash", "-c", command]).check()
