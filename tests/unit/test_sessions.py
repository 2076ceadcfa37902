"""The sessions that nox offers: listed, never run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from builds import matrix

ROOT = Path(__file__).parents[2]
CELL = "570.172.08-1877.3-amd64-cloud"


def nox(*arguments: str, **environ: str) -> str:
    """What nox says of a list; with nothing selected but what is given."""
    ours = {name: value for name, value in os.environ.items() if name not in SELECTION}
    done = subprocess.run(
        [sys.executable, "-m", "nox", *arguments],
        cwd=ROOT,
        env=ours | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


SELECTION = {"DRIVER_VERSION", "GL_VERSION", "TARGET_ARCH", "KERNEL_FLAVOR", "NOXSESSION"}


def sessions(*arguments: str, **environ: str) -> list[str]:
    return [each["session"] for each in json.loads(nox("-l", "--json", *arguments, **environ))]


def test_a_list_of_every_cell_names_each_of_them_once() -> None:
    listed = re.findall(r"^[*-] (\S+)", nox("-l", GL_VERSION="all"), re.MULTILINE)
    cells = [match[1] for name in listed if (match := re.fullmatch(r"[a-z-]+\((.+)\)", name))]
    assert cells == [cell.id for cell in matrix.select({"GL_VERSION": "all"})]
    assert {"setup", "lab", "plan", "verify", "push", "summary"} <= set(listed)


def test_a_list_of_few_cells_names_every_session_of_them() -> None:
    listed = re.findall(r"^[*-] (\S+)", nox("-l", GL_VERSION="1877.3", DRIVER_VERSION="570.172.08"), re.MULTILINE)
    assert {f"{verb}({CELL})" for verb in ("lab", "build-driver", "build-image", "build", "verify", "push")} < set(
        listed
    )


def test_what_machines_read_has_the_sessions_of_every_cell() -> None:
    cells = matrix.select({"GL_VERSION": "all"})
    assert sessions(GL_VERSION="all") == [f"{verb}({cell})" for verb in ("build", "verify") for cell in cells]
    assert sessions("-s", "push", GL_VERSION="all") == [f"push({cell})" for cell in cells]


def test_a_plan_is_one_session_for_the_whole_selection_or_one_for_each_cell_that_is_named() -> None:
    assert sessions("-s", "plan", GL_VERSION="all") == ["plan"]
    assert sessions("-s", f"plan({CELL})") == [f"plan({CELL})"]
