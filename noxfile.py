"""Sessions. What they do is in builds/; nothing here reaches for an engine or the network at import."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path

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
    "builds/compile.sh",
    "builds/installer/nvidia-driver",
    *map(str, Path("builds/installer").glob("*.sh")),
    ".ci/run",
)
nox.options.default_venv_backend = "none"


def _cells() -> tuple[list[Cell], list[Cell]]:
    """The cells that the command line names in full, such as ``build(<cell id>)``, and those that are selected."""
    ours = itertools.takewhile(lambda argument: argument != "--", sys.argv[1:])
    named = [found[1] for argument in ours if (found := re.fullmatch(r"[a-z-]+\(([^()]+)\)", argument))]
    try:
        return [matrix.find(text) for text in dict.fromkeys(named)], list(matrix.select(os.environ))
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.kind))


NAMED, SELECTED = _cells()
CELLS = list(dict.fromkeys([*SELECTED, *NAMED]))
per_cell = nox.parametrize("cell", [nox.param(cell.id, id=cell.id) for cell in CELLS])


def _builds(session: nox.Session, verb: str, *arguments: str) -> None:
    session.run(sys.executable, "-m", "builds", verb, *arguments, *session.posargs, external=True)


@nox.session
def setup(session: nox.Session) -> None:
    """Make a Debian machine ready: container engine, mmdebstrap. Runs only when named."""
    session.run(sys.executable, "-m", "builds", "setup", external=True)


@nox.session(default=False)
@per_cell
def lab(session: nox.Session, cell: str) -> None:
    """Make a lab cell's inputs from Debian's archive, anew where it has newer packages."""
    _builds(session, "lab", cell)


@nox.session(default=False)
@per_cell
def plan(session: nox.Session, cell: str) -> None:
    """Show what a cell depends on: inputs, kernel, keys, tags, rules. -- --json for machines."""
    _builds(session, "plan", cell)


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
def push(session: nox.Session, cell: str) -> None:
    """Put a verified image into the repository of IMAGE_PATH; nothing that has no passing record."""
    _builds(session, "push", cell)


@nox.session(name="probe-package", default=False)
def probe_package(session: nox.Session) -> None:
    """Read a driver package and say whether every field is understood: -- VERSION or FILE."""
    _builds(session, "probe-package")


@nox.session(default=False)
def summary(session: nox.Session) -> None:
    """Print digest, size, times and checks of the selected cells."""
    session.run(sys.executable, "-m", "builds", "summary", *(cell.id for cell in NAMED or SELECTED), external=True)


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
    session.run(sys.executable, "-m", "pytest", "tests/unit", "tests/integration", *session.posargs, external=True)


@nox.session(default=False)
def clean(session: nox.Session) -> None:
    """Empty out/; -- --all empties the cache too."""
    session.run(sys.executable, "-m", "builds", "clean", *session.posargs, external=True)
