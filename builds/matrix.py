"""The matrix files: which cells there are, what is excluded and why, and which of the cells are selected.

Reading needs neither engine nor network, and is quick: ``nox -l`` does it on every call.
"""

from __future__ import annotations

import difflib
import enum
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import matrix_file
from .errors import ConfigurationError
from .model import Arch, Cell, Flavor, ModuleType
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
        return self.is_about(driver) and _in_range(kernel, self.kernel)

    def is_about(self, driver: str) -> bool:
        """Whether the rule is about this driver version, on some kernel or other."""
        return _in_range(driver, self.driver)


@functools.cache
def _in_range(version: str, versions: str) -> bool:
    return SpecifierSet(versions).contains(version, prereleases=True)


class Lifecycle(enum.StrEnum):
    """Whether a release is selected where nobody names it."""

    SUPPORTED = "supported"
    PAST = "past"


@dataclass(frozen=True)
class Release:
    """A release, with what the matrix expects of its kernel. The kernel that is built for is read from its headers."""

    gl: str
    kernel: str | None
    """Version of the kernel package that it ships, such as ``6.12.44-3gl0``; None where it is not known."""
    lifecycle: Lifecycle
    os_tag: str
    """OS part of the tags that the operator computes on its nodes."""

    @property
    def upstream(self) -> str | None:
        """The upstream version of its kernel, such as ``6.12.44``: what exclusion rules are keyed on."""
        return self.kernel and self.kernel.partition("-")[0]

    def kernel_name(self, cell: Cell) -> str | None:
        """The kernel's expected release name, as Garden Linux makes it: the package's build is not in it."""
        return self.upstream and f"{self.upstream}-{'cloud-' if cell.flavor is Flavor.CLOUD else ''}{cell.arch}"


@dataclass(frozen=True)
class Matrix:
    """One matrix file, checked."""

    path: Path
    inputs: str
    settings: Mapping[str, str]
    os_tag: str
    alias: str
    base: Mapping[Arch, str]
    pins: Mapping[tuple[str, Arch], str]
    """Pinned sha256 of driver packages."""
    releases: Mapping[str, Release]
    gvisor: Mapping[str, str]
    """Driver version that gVisor supports, per branch."""
    cells: tuple[Cell, ...]
    rules: tuple[Rule, ...]
    default: Cell | None
    representative: tuple[Cell, ...]
    """Cells that stand for all: one of every kind that differs in how it is built."""

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._cells

    def release(self, cell: Cell) -> Release:
        """The release that a cell is of. Raises ConfigurationError naming the nearest for one that is not listed."""
        if cell.gl not in self.releases:
            raise unknown("release", cell.gl, self.releases)
        return self.releases[cell.gl]

    def siblings(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells whose image is expected to be the same as a cell's, itself included; oldest release first.

        They compute the same tag: driver, architecture, flavour and OS tag are the same, and so is the kernel's name.
        Of a cell whose kernel is not known, that is known of itself only.
        """
        place = self._place(cell)
        return self._places[place] if place in self._places and cell in self else (cell,)

    def absent(self, cell: Cell) -> dict[ModuleType, str]:
        """The module types that rules are expected to exclude, with reasons. An unknown kernel is in no range."""
        upstream = self.release(cell).upstream
        return {
            rule.module_type: rule.reason
            for rule in self.rules
            if rule.is_about(cell.driver) and (rule.applies(cell.driver, upstream) if upstream else not rule.kernel)
        }

    def owns_branch(self, cell: Cell) -> bool:
        """Whether a cell's driver is the newest of its branch for the same node: it alone moves the branch's tag.

        One that is expected to be excluded altogether for that node's kernel has no image, so it owns nothing.
        """
        driver, *node = self._place(cell)
        rivals = (
            other.driver
            for version in self._branches[cell.driver_major]
            for other in self._places.get((version, *node), ())[:1]
            if version != driver and len(self.absent(other)) < len(ModuleType)
        )
        return max((driver, *rivals), key=Version) == driver

    def _place(self, cell: Cell) -> tuple[str, ...]:
        """What cells with one image have in common; where the kernel's name is not known, that is the release."""
        release = self.release(cell)
        kernel = release.kernel_name(cell) or f"of {cell.gl}"
        return (cell.driver, cell.arch, cell.flavor, release.os_tag, kernel)

    @functools.cached_property
    def _cells(self) -> frozenset[Cell]:
        return frozenset(self.cells)

    @functools.cached_property
    def _places(self) -> Mapping[tuple[str, ...], tuple[Cell, ...]]:
        found: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(self._place(cell), []).append(cell)
        return {place: tuple(sorted(cells, key=order)) for place, cells in found.items()}

    @functools.cached_property
    def _branches(self) -> Mapping[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for cell in self.cells:
            found.setdefault(cell.driver_major, set()).add(cell.driver)
        return {branch: frozenset(drivers) for branch, drivers in found.items()}


def order(cell: Cell) -> tuple[object, ...]:
    """What cells are sorted by: versions by their numbers, so that 1877.10 comes after 1877.9."""
    return (_natural(cell.driver), _natural(cell.gl), cell.arch, cell.flavor)


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(number or 0), other) for number, other in re.findall(r"(\d+)|(\D+)", text))


@functools.cache
def load(path: Path) -> Matrix:
    """Read a matrix file. Raises ConfigurationError with all of its problems, each with line and path."""
    document = matrix_file.read(path)
    return Matrix(
        path=path,
        inputs=document["inputs"],
        settings=document.get("settings", {}),
        os_tag=document["os_tag"],
        alias=document["alias"],
        base={Arch(arch): gl for arch, gl in document["base"].items()},
        pins={
            (driver["version"], Arch(arch)): sha256
            for driver in document["drivers"]
            for arch, sha256 in driver.get("sha256", {}).items()
        },
        releases={
            release["gl"]: Release(
                gl=release["gl"],
                kernel=release.get("kernel"),
                lifecycle=Lifecycle(release.get("lifecycle", Lifecycle.SUPPORTED)),
                os_tag=release.get("os_tag", document["os_tag"]).format(gl=release["gl"]),
            )
            for release in document["releases"]
        },
        gvisor=document.get("gvisor", {}),
        cells=tuple(matrix_file.cells(document)),
        rules=tuple(
            Rule(rule["driver"], rule.get("kernel", ""), ModuleType(rule["module_type"]), rule["reason"])
            for rule in document.get("exclude", [])
        ),
        default=Cell.parse(document["default"]) if "default" in document else None,
        representative=tuple(map(Cell.parse, document.get("representative", ()))),
    )


def load_all() -> tuple[Matrix, ...]:
    """The lab matrix and the release matrix."""
    return tuple(map(load, FILES))


def matrix_of(cell: Cell) -> Matrix:
    """The matrix that a cell is of. Raises ConfigurationError naming the nearest known cells."""
    for matrix in load_all():
        if cell in matrix:
            return matrix
    raise unknown("cell", cell.id, (known.id for matrix in load_all() for known in matrix.cells))


def representative() -> tuple[Cell, ...]:
    """The cells that stand for all of the matrices."""
    return tuple(cell for matrix in load_all() for cell in matrix.representative)


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

    An axis that is not set is open for drivers and releases, and has its default for architecture and flavour; with
    neither driver nor release set, those of the default cell are taken. ``GL_VERSION=all`` is every supported Garden
    Linux release, ``past`` every other one, ``lab`` those of the lab; a word opens every axis that is not set, and past
    releases are selected by name or by their word only. Raises ConfigurationError for a value that no cell has, naming
    the nearest, and for a selection that holds no cell.
    """
    given = {row.name: environ[row.variable] for row in SELECTION if environ.get(row.variable)}
    for row in SELECTION:
        if row.name in given and not _values(given[row.name]):
            raise ConfigurationError(row.variable, "names nothing", got=repr(given[row.name]), hint="unset it")
    matrices = load_all()
    if not given:
        return tuple(matrix.default for matrix in matrices if matrix.default)
    everything = [cell for matrix in matrices for cell in matrix.cells]
    cells = everything
    if not given.keys() & {"driver_version", "gl_version"}:
        defaults = [(matrix.default.driver, matrix.default.gl) for matrix in matrices if matrix.default]
        cells = [cell for cell in everything if (cell.driver, cell.gl) in defaults]
    for row in SELECTION:
        axis = _AXES[row.name]
        known = {str(getattr(cell, axis)) for cell in everything}
        groups = _groups(matrices) if axis == "gl" else {"all": known}
        grouped = not _groups(matrices).keys().isdisjoint(_values(given.get("gl_version", "")))
        values = _values(given.get(row.name) or ("" if grouped else row.default)) or ({"all", "lab"} & groups.keys())
        for value in sorted(values - known - groups.keys()):
            raise unknown(row.variable, value, known)
        wanted = set[str]().union(*(groups.get(value, {value}) for value in values))
        cells = [cell for cell in cells if str(getattr(cell, axis)) in wanted]
    if not cells:
        said = " ".join(f"{row.variable}={given[row.name]}" for row in SELECTION if row.name in given)
        raise ConfigurationError(
            "selection", "holds no cell", got=said, hint="`GL_VERSION=all,past,lab nox -l` lists every cell"
        )
    return tuple(sorted(cells, key=order))


_AXES = {"driver_version": "driver", "gl_version": "gl", "target_arch": "arch", "kernel_flavor": "flavor"}


def _values(text: str) -> set[str]:
    """The values in a list; ``metal`` is the older name of ``baremetal``."""
    values = {value.strip() for value in text.split(",")} - {""}
    return {"baremetal" if value == "metal" else value for value in values}


def _groups(matrices: Iterable[Matrix]) -> dict[str, set[str]]:
    """The releases that stand behind a word for many of them."""
    groups: dict[str, set[str]] = {"all": set(), "past": set(), "lab": set()}
    for matrix in matrices:
        for release in matrix.releases.values():
            past = release.lifecycle is Lifecycle.PAST
            groups["past" if past else "lab" if matrix.inputs == "lab" else "all"].add(release.gl)
    return groups


def unknown(subject: str, value: str, known: Iterable[str]) -> ConfigurationError:
    """The error for a name that is not among the known ones: it names the nearest."""
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.3) or names[:3]
    return ConfigurationError(f"{subject} {value}", "is not in any matrix", hint=f"nearest: {', '.join(near)}")
