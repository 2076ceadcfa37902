"""Sessions. What they do is in builds/; nothing here reaches for an engine or the network at import."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import nox

try:
    from builds import matrix
    from builds.errors import HarnessError
    from builds.model import Cell
except ImportError as error:
    sys.exit(f"noxfile: {error}\nhint: pip install -e . in the environment that nox runs from")

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["build", "verify"]
SCRIPTS = (
    *map(str, Path("tests/node/stand-ins").iterdir()),
    "builds/compile.sh",
    "builds/guest/compile.sh",
    "builds/installer/nvidia-driver",
    *map(str, Path("builds/installer").glob("*.sh")),
    "tests/node/guest/init",
    "tests/node/guest/nvidia-smi",
    "tests/node/guest/nv-fabricmanager",
    *map(str, Path("tests/node/guest").glob("*.sh")),
    "helm/smoke-test/files/check-driver.sh",
    ".ci/run",
)
nox.options.default_venv_backend = "none"
F = TypeVar("F", bound=Callable[..., Any])


def _named() -> list[tuple[str, str]]:
    """The sessions that the command line names with their cell, such as ``build(<cell id>)``."""
    ours = itertools.takewhile(lambda argument: argument != "--", sys.argv[1:])
    found = (re.fullmatch(r"([a-z-]+)\(([^()]+)\)", argument) for argument in ours)
    return [(match[1], match[2]) for match in found if match]


def _cells(named: list[tuple[str, str]]) -> tuple[list[Cell], list[Cell]]:
    """The cells that are named, and those that are selected."""
    try:
        return [matrix.find(text) for text in dict.fromkeys(text for _, text in named)], [*matrix.select(os.environ)]
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.kind))


NAMED, SELECTED = _cells(_named())
CELLS = list(dict.fromkeys([*SELECTED, *NAMED]))
LISTED_ONCE = len(CELLS) > 16 and set(sys.argv[1:]) in ({"-l"}, {"--list"})
"""A list of many cells names each of them with one session only."""


def _parametrize(cells: list[Cell]) -> Callable[[F], F]:
    parameters: Callable[[F], F] = nox.parametrize("cell", [nox.param(cell.id, id=cell.id) for cell in cells])
    return parameters


def per_cell(session: F) -> F:
    """One session a cell."""
    return session if LISTED_ONCE and session.__name__ != "build" else _parametrize(CELLS)(session)


def _builds(session: nox.Session, verb: str, *arguments: str) -> None:
    """Run a verb. Of several selected cells, those that rules exclude are no failure; of one that is named it is."""
    if len(SELECTED) > 1 and not NAMED:
        arguments = (*arguments, "--among-others")
    session.run(sys.executable, "-m", "builds", verb, *arguments, *session.posargs, external=True)


@nox.session
def setup(session: nox.Session) -> None:
    """Make a Debian machine ready: container engine, mmdebstrap; with TARGET_ARCH or -- --arch emulators as well."""
    arches = re.findall(r"--arch[= ](\S+)", " ".join(session.posargs))  # what else is there is for other sessions
    session.run(sys.executable, "-m", "builds", "setup", *(f"--arch={arch}" for arch in arches), external=True)


@nox.session(default=False)
@per_cell
def lab(session: nox.Session, cell: str) -> None:
    """Make a lab cell's inputs from Debian's archive, anew where it has newer packages."""
    _builds(session, "lab", cell)


if planned := [matrix.find(text) for verb, text in _named() if verb == "plan"]:

    @nox.session(default=False)
    @_parametrize(planned)
    def plan(session: nox.Session, cell: str) -> None:
        """Show what a cell depends on: inputs, kernel, keys, tags, rules. -- --json for machines."""
        _builds(session, "plan", cell)

else:

    @nox.session(default=False)
    def plan(session: nox.Session) -> None:
        """Show what one cell depends on, or what becomes of many, offline. -- --json, -- --ci for machines."""
        _builds(session, "plan", *(cell.id for cell in NAMED))


@nox.session(name="probe-headers", default=False)
@per_cell
def probe_headers(session: nox.Session, cell: str) -> None:
    """Tell in seconds, before compiling, which known changes of its interface a cell's kernel has."""
    _builds(session, "probe-headers", cell)


@nox.session(name="build-driver", default=False)
@per_cell
def build_driver(session: nox.Session, cell: str) -> None:
    """Compile a cell's kernel modules into out/<cell>/modules."""
    _builds(session, "build-driver", cell)


@nox.session(name="build-image", default=False)
@per_cell
def build_image(session: nox.Session, cell: str) -> None:
    """Pack a cell's image from compiled modules into out/<cell>/image."""
    _builds(session, "build-image", cell)


@nox.session
@per_cell
def build(session: nox.Session, cell: str) -> None:
    """Compile and pack a cell."""
    session.notify("summary")
    _builds(session, "build", cell)


@nox.session
@per_cell
def verify(session: nox.Session, cell: str) -> None:
    """Prove a cell's image right; -- --image REF for one that is there already, -- --record FILE repeats one."""
    options = {argument.partition("=")[0] for argument in session.posargs}
    if not options & {"--image", "--record"}:
        session.notify("summary")
        _builds(session, "verify", cell)
    elif cell != (NAMED or SELECTED)[0].id:
        session.skip("--image and --record name the one image to verify")
    else:  # its cell is what the command line names, or else what the record or the tag says
        _builds(session, "verify", *([cell] if NAMED else []))


@nox.session(default=False)
@per_cell
def node(session: nox.Session, cell: str) -> None:
    """Run a cell's image on a node, a virtual machine, as the GPU Operator runs it; two minutes."""
    command = (sys.executable, "-m", "pytest", "tests/node/test_node.py", "-s", *session.posargs)
    session.run(*command, env={"NODE_CELL": cell}, external=True)


@nox.session(name="lab-matrix", default=False)
def lab_matrix(session: nox.Session) -> None:
    """Build and verify the lab's representative cells, and prove its rules; 40 minutes. -- CELL… for others."""
    session.run(sys.executable, "-m", "builds", "lab-matrix", *session.posargs, external=True)


@nox.session(default=False)
@per_cell
def push(session: nox.Session, cell: str) -> None:
    """Put a verified image into the repository of IMAGE_PATH; nothing that has no passing record."""
    _builds(session, "push", cell)


@nox.session(name="probe-package", default=False)
def probe_package(session: nox.Session) -> None:
    """Read a driver package and say whether every field is understood: -- VERSION or FILE."""
    session.run(sys.executable, "-m", "builds", "probe-package", *session.posargs, external=True)


@nox.session(default=False)
def helm(session: nox.Session) -> None:
    """Bring the Helm values in line with the matrix; -- --check, or -- --output DIR for the registry of IMAGE_PATH."""
    session.run(sys.executable, "-m", "builds", "helm", *session.posargs, external=True)


@nox.session(default=False)
def summary(session: nox.Session) -> None:
    """Print digest, size, times and checks of the selected cells."""
    session.run(sys.executable, "-m", "builds", "summary", *(cell.id for cell in NAMED), external=True)


def _lint(session: nox.Session) -> None:
    tools = Path(sys.executable).parent
    if not (tools / "ruff").exists():
        session.error("the linters are missing: pip install -e '.[dev]'")
    for command in (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["shellcheck", "-x", *SCRIPTS],
        ["yamllint", "--strict", "."],
    ):
        session.run(str(tools / command[0]), *command[1:], external=True)


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """Check style and types: ruff, mypy, shellcheck, yamllint."""
    _lint(session)


@nox.session(default=False)
def unit(session: nox.Session) -> None:
    """Run the tests that need neither engine nor network; seconds."""
    session.run(sys.executable, "-m", "pytest", "tests/unit", *session.posargs, external=True)


@nox.session(default=False)
def test(session: nox.Session) -> None:
    """Run all tests: linters, unit tests, and lab, build and verify for real."""
    _lint(session)
    # One image of the tests is for arm64.
    session.run(sys.executable, "-m", "builds", "setup", "--arch", "arm64", external=True)
    # A file's tests share what they build; of two files at once, one waits for processes while the other computes.
    workers = ("-n", "2", "--dist", "loadfile")
    session.run(
        *(sys.executable, "-m", "pytest", *workers, "tests/unit", "tests/integration", "tests/node", *session.posargs),
        external=True,
    )


@nox.session(default=False)
def clean(session: nox.Session) -> None:
    """Empty out/; -- --all empties the cache too."""
    session.run(sys.executable, "-m", "builds", "clean", *session.posargs, external=True)
