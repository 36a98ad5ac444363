"""The lock files say what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> dict[str, set[str]]:
    """Package -> versions pinned (more than one where platforms or Pythons differ)."""
    pins: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.MULTILINE):
        pins.setdefault(canonicalize_name(package), set()).add(version)
    return pins


@pytest.mark.parametrize(
    ("lock_file", "asked"),
    [
        ("requirements.lock", PROJECT["dependencies"]),
        ("requirements-dev.lock", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]),
    ],
)
def test_lock_answers_pyproject(lock_file: str, asked: list[str]) -> None:
    """Every dependency of pyproject.toml is pinned within its bounds; else somebody forgot bin/lock."""
    pins = locked(lock_file)
    stale = [
        line
        for line in asked
        for wanted in [Requirement(line)]
        if not pins.get(canonicalize_name(wanted.name))
        or not all(wanted.specifier.contains(version) for version in pins[canonicalize_name(wanted.name)])
    ]
    assert not stale, f"{lock_file} does not fit pyproject.toml, run bin/lock: {stale}"


def test_tests_run_on_what_ships() -> None:
    """The dev lock holds all of the runtime lock at the same versions."""
    runtime, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {name: dev.get(name) for name in runtime} == runtime
