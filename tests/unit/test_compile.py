"""How modules are compiled where the image, the engine and the kernel are of one architecture or of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builds import compile as compiling
from builds import oci
from builds.engine import Engine
from builds.model import Arch, Cell
from builds.plan import Inputs, Plan, SetInputs

from .test_plan import CELL, KERNEL, make

ARM = Cell.parse("570.172.08-1877.3-arm64-cloud")
CROSS = replace(KERNEL, cross="aarch64-linux-gnu-")


def engine(arch: str) -> Engine:
    nobody: Any = None
    return Engine(nobody, "unix:///x", "1", arch)


def variables(plan: Plan) -> dict[str, str]:
    return compiling._variables(plan, plan.sets[0])


@pytest.mark.parametrize(
    ("cell", "kernel", "runs_on", "on", "said"),
    [
        (CELL, KERNEL, Arch.AMD64, "amd64", "native"),
        (ARM, KERNEL, Arch.ARM64, "aarch64", "native"),
        (ARM, CROSS, Arch.AMD64, "x86_64", "cross-compiled by aarch64-linux-gnu-gcc on amd64"),
    ],
)
def test_it_is_said_how_modules_are_compiled(
    cell: Cell, kernel: Any, runs_on: Arch, on: str, said: str, tmp_path: Path
) -> None:
    oci.create(tmp_path)
    image = oci.add_image(tmp_path, [], arch=runs_on, names=["kmodbuild"])
    (of,) = make(cell=cell, kernel=kernel).sets
    inputs = Inputs({of.id: SetInputs(image, tmp_path)}, image, tmp_path, {})
    assert compiling.way(of, inputs, engine(on)) == said


def test_a_build_is_told_its_architecture_and_its_tools_only_where_they_are_others() -> None:
    told = variables(make())
    assert told["ARCH"] == "x86_64" and "CROSS_COMPILE" not in told
    told = variables(make(cell=ARM, kernel=CROSS))
    assert (told["ARCH"], told["CROSS_COMPILE"]) == ("arm64", "aarch64-linux-gnu-")
    assert (told["SYSSRC"], told["SYSOUT"]) == (KERNEL.source, KERNEL.output)
