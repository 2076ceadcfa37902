"""The matrix files: which cells there are, what is excluded and why, and which of the cells are selected.

Reading needs neither engine nor network, and is quick: ``nox -l`` does it on every call.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import matrix_file
from .errors import ConfigurationError
from .model import Arch, Cell, ModuleType
from .settings import SELECTION

HERE = Path(__file__).parent
FILES = (HERE / "lab.yaml", HERE / "matrix.yaml")


@dataclass(frozen=True)
class Rule:
    """Says that a module type of some drivers cannot be built for some kernels, and why."""

    driver: str
    """Range of driver versions, as PEP 440 writes ranges."""
    kernel: str
    """Range of upstream kernel versions; empty: any."""
    module_type: ModuleType
    reason: str

    def applies(self, driver: str, kernel: str) -> bool:
        """Whether the rule is about this driver version and this upstream kernel version."""
        return SpecifierSet(self.driver).contains(driver) and SpecifierSet(self.kernel).contains(
            kernel, prereleases=True
        )


@dataclass(frozen=True)
class Matrix:
    """One matrix file, checked."""

    path: Path
    inputs: str
    settings: Mapping[str, str]
    os_tag: str
    os_tags: Mapping[str, str]
    """Those of releases that have another than the matrix."""
    alias: str
    base: Mapping[Arch, str]
    pins: Mapping[tuple[str, Arch], str]
    """Pinned sha256 of driver packages."""
    cells: tuple[Cell, ...]
    rules: tuple[Rule, ...]
    default: Cell | None

    def os_tag_of(self, cell: Cell) -> str:
        """OS part of the tags that the GPU Operator computes for a cell's node."""
        return self.os_tags.get(cell.gl, self.os_tag).format(gl=cell.gl)

    def owns_branch(self, cell: Cell) -> bool:
        """Whether a cell's driver is the newest of its branch for the same node: it alone moves the branch's tag."""
        rivals = [
            other.driver
            for other in self.cells
            if (other.gl, other.arch, other.flavor, other.driver_major)
            == (cell.gl, cell.arch, cell.flavor, cell.driver_major)
        ]
        return max((cell.driver, *rivals), key=Version) == cell.driver


@functools.cache
def load(path: Path) -> Matrix:
    """Read a matrix file. Raises ConfigurationError with all of its problems, each with line and path."""
    document = matrix_file.read(path)
    return Matrix(
        path=path,
        inputs=document["inputs"],
        settings=document.get("settings", {}),
        os_tag=document["os_tag"],
        os_tags={release["gl"]: release["os_tag"] for release in document["releases"] if "os_tag" in release},
        alias=document["alias"],
        base={Arch(arch): gl for arch, gl in document["base"].items()},
        pins={
            (driver["version"], Arch(arch)): sha256
            for driver in document["drivers"]
            for arch, sha256 in driver.get("sha256", {}).items()
        },
        cells=tuple(matrix_file.cells(document)),
        rules=tuple(
            Rule(rule["driver"], rule.get("kernel", ""), ModuleType(rule["module_type"]), rule["reason"])
            for rule in document.get("exclude", [])
        ),
        default=Cell.parse(document["default"]) if "default" in document else None,
    )


def load_all() -> tuple[Matrix, ...]:
    """The lab matrix and the release matrix."""
    return tuple(map(load, FILES))


def matrix_of(cell: Cell) -> Matrix:
    """The matrix that a cell is of. Raises ConfigurationError naming the nearest known cells."""
    for matrix in load_all():
        if cell in matrix.cells:
            return matrix
    raise unknown("cell", cell.id, (known.id for matrix in load_all() for known in matrix.cells))


def find(text: str) -> Cell:
    """The cell that an id means. Raises ConfigurationError naming the nearest known cells where it means none."""
    try:
        cell = Cell.parse(text)
    except ConfigurationError as error:
        raise unknown("cell", text, (known.id for matrix in load_all() for known in matrix.cells)) from error
    matrix_of(cell)
    return cell


def select(environ: Mapping[str, str]) -> tuple[Cell, ...]:
    """The cells that the environment selects; the default cell where it selects nothing.

    An axis that is not set is open for drivers and releases, and has its default for architecture and flavour;
    ``GL_VERSION=all`` opens every axis that is not set. Raises ConfigurationError for a value that no cell has,
    naming the nearest, and for a selection that holds no cell.
    """
    given = {row.name: environ[row.variable] for row in SELECTION if environ.get(row.variable)}
    matrices = load_all()
    if not given:
        return tuple(matrix.default for matrix in matrices if matrix.default)
    cells = [cell for matrix in matrices for cell in matrix.cells]
    axes = {"driver_version": "driver", "gl_version": "gl", "target_arch": "arch", "kernel_flavor": "flavor"}
    for row in SELECTION:
        wanted = given.get(row.name) or ("all" if given.get("gl_version") == "all" else row.default)
        if wanted in ("", "all"):
            continue
        values = {"baremetal" if value.strip() == "metal" else value.strip() for value in wanted.split(",")}
        known = {str(getattr(cell, axes[row.name])) for matrix in matrices for cell in matrix.cells}
        for value in sorted(values - known):
            raise unknown(row.variable, value, known)
        cells = [cell for cell in cells if str(getattr(cell, axes[row.name])) in values]
    if not cells:
        said = " ".join(f"{row.variable}={given[row.name]}" for row in SELECTION if row.name in given)
        raise ConfigurationError(
            "selection", "holds no cell", got=said, hint="`GL_VERSION=all nox -l` lists every cell"
        )
    return tuple(sorted(cells))


def unknown(subject: str, value: str, known: Iterable[str]) -> ConfigurationError:
    """The error for a name that is not among the known ones: it names the nearest."""
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.3) or names[:3]
    return ConfigurationError(f"{subject} {value}", "is not in any matrix", hint=f"nearest: {', '.join(near)}")
