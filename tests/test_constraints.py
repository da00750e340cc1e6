"""The files in constraints/ against the ranges in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
UNBOUNDED = {"ruff", "mypy", "types-pyyaml", "hatchling"}
"""Tools of development, which no test against the oldest versions runs."""
TORCH_S_OWN = re.compile(r"torch|torchvision|triton|sympy|mpmath|setuptools|nvidia-.*|cuda-.*")
"""What a build of torch pins for itself, so that TORCH can choose another."""


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """Return what the project and some of its extras require, by name, with what those extras name of the others."""
    found: dict[str, Requirement] = {}
    waiting = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    for one in map(Requirement, waiting):
        found |= {canonicalize_name(one.name): one} if one.name != "twin-bench" else requirements(*one.extras)
    return found


@pytest.fixture(scope="module")
def ranges() -> dict[str, Requirement]:
    return requirements(*PROJECT["optional-dependencies"])


def pins(name: str) -> dict[str, Version]:
    """Return what a file pins; each of its lines is NAME==VERSION, with neither a hash nor an address."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints" / name).read_text().splitlines()]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line) for line in lines if line]
    assert all(pairs)
    return {canonicalize_name(pair[1]): Version(pair[2]) for pair in pairs if pair}


def test_the_oldest_versions_are_the_lower_bounds(ranges: dict[str, Requirement]) -> None:
    bounds = {
        name: Version(bound.version)
        for name, requirement in ranges.items()
        for bound in requirement.specifier
        if bound.operator in (">=", "==")
    }
    assert bounds.keys() == ranges.keys() - UNBOUNDED
    assert pins("oldest.txt") == bounds


def test_every_range_ends(ranges: dict[str, Requirement]) -> None:
    ends = {name for name, one in ranges.items() if {bound.operator for bound in one.specifier} & {"<", "=="}}
    assert ends == ranges.keys() - UNBOUNDED


@pytest.mark.parametrize(("file", "extra"), [("lock.txt", "test"), ("inspect.txt", "test-inspect")])
def test_a_lock_pins_every_requirement_within_its_range_and_nothing_of_torch(file: str, extra: str) -> None:
    locked, needed = pins(file), requirements(extra)
    assert needed.keys() - locked.keys() == {"torch"}
    for name in needed.keys() & locked.keys():
        assert locked[name] in needed[name].specifier
    assert not [name for name in locked if TORCH_S_OWN.fullmatch(name)]


def test_inspect_is_not_installed_beside_helm() -> None:
    assert {"inspect-ai", "crfm-helm"} & requirements("all").keys() == {"crfm-helm"}
