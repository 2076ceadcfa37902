"""Tests that run for real: Debian's archive, a container engine, compiles. They share one build.

The build is that of the default cell in the user's own cache, so a second run of the tests takes a fraction of the
first; what tests break they break in copies.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from builds import engine, matrix, pipeline
from builds.cache import Cache
from builds.console import Reporter
from builds.engine import Engine
from builds.model import Cell
from builds.oci import Image
from builds.plan import Inputs, ModuleSet, Plan
from builds.settings import SELECTION, SETTINGS

from . import registries

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """A cell that was built, with what its checks need."""

    cell: Cell
    plan: Plan
    inputs: Inputs
    image: Image
    cache: Cache
    engine: Engine
    report: Reporter
    out: Path
    kernels: Path | None
    """What KERNEL_IMAGE is for the cell."""

    @property
    def set(self) -> ModuleSet:
        """The one module set of its plan."""
        (one,) = self.plan.sets
        return one

    @property
    def kmodbuild(self) -> Image:
        """The image that the modules were compiled in."""
        return self.inputs.sets[self.set.id].kmodbuild


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder needs an engine."""
    for item in items:
        item.add_marker(pytest.mark.engine)


def build(cell: Cell, out: Path) -> Built:
    report = Reporter()
    run = pipeline.start(cell, {"out_dir": str(out)}, report)
    image = pipeline.build(run)
    made, inputs = pipeline.plan(run)
    return Built(cell, made, inputs, image, run.cache, engine.connect(), report, run.out, run.settings.kernel_image)


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder that the tests share."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="session")
def built(out: Path) -> Built:
    """The default cell, built."""
    return build(matrix.select({})[0], out)


@pytest.fixture(scope="session")
def built_with_rule(out: Path) -> Built:
    """The lab cell of which a rule leaves one module type out; its kernel has DRM, and is in its kmodbuild image."""
    return build(Cell.parse("550.163.01-debian13-amd64-baremetal"), out)


@pytest.fixture(scope="session")
def registry_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's docker-registry."""
    return registries.fetch(tmp_path_factory.mktemp("docker-registry"))


Cli = Callable[..., subprocess.CompletedProcess[str]]


def environment(**more: str) -> dict[str, str]:
    """The environment without what would select cells or move folders, and with ``more``."""
    ours = {row.variable for row in (*SELECTION, *SETTINGS)} - {"CACHE_DIR"}
    return {**{name: value for name, value in os.environ.items() if name not in ours}, **more}


def run_builds(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``python -m builds`` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "builds", *arguments],
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def builds(out: Path) -> Cli:
    """Run ``python -m builds``, with the shared output folder."""

    def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return run_builds(*arguments, env={"OUT_DIR": str(out), **(env or {})})

    return run


@pytest.fixture(scope="session")
def verified(built: Built) -> Built:
    """The default cell, with a passing record."""
    done = run_builds("verify", str(built.cell), env={"OUT_DIR": str(built.out.parent)})
    assert done.returncode == 0, done.stderr
    return built
