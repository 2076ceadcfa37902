"""The plan of many cells at a glance: what would be built, reused or left out, and what nobody can say yet.

Needs neither engine nor network: it rests on what the matrix expects of each release's kernel. What is built follows
the headers, as the plan of a cell does.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from . import tags
from .cache import key_of
from .console import Reporter
from .errors import ConfigurationError
from .matrix import Matrix, order
from .model import Arch, Cell, Flavor, ModuleType
from .tags import TagKind

JOBS = 256
"""Jobs that GitHub takes in one matrix."""

_HERE = "on this machine"


class Status(enum.StrEnum):
    """What becomes of a cell."""

    BUILD = "build"
    REUSED = "reused"
    """Another cell's image is this one's too, or the cell's own is there already: nothing is compiled."""
    JOINED = "joined"
    """Another cell's image gets one more module set: the kernels have one name, but are different builds."""
    EXCLUDED = "excluded"
    """Rules leave no module type."""
    UNKNOWN = "unknown until resolved"
    """The matrix does not know the kernel."""


@dataclass(frozen=True)
class CellOutlook:
    """What becomes of one cell, and why."""

    cell: Cell
    status: Status
    kernel: str | None
    """Expected release name of its kernel."""
    package: str | None
    """Version of the kernel package that is expected."""
    absent: Mapping[ModuleType, str]
    """Module types that rules leave out, with reasons."""
    image: str | None
    """Name of the image that it gets; None where there is none, or none that is known."""
    note: str


@dataclass(frozen=True)
class SetOutlook:
    """The modules of one image for one kernel build."""

    package: str
    releases: tuple[str, ...]
    """Releases that ship the build, oldest first; they need not be among the selected ones."""
    types: tuple[ModuleType, ...]


@dataclass(frozen=True)
class ImageOutlook:
    """One image, for all cells that compute its tag."""

    name: str
    """Its tag with the full driver version."""
    driver: str
    arch: Arch
    flavor: Flavor
    kernel: str
    """Expected release name of the kernel."""
    os_tag: str
    cells: tuple[Cell, ...]
    """Those that are selected, oldest release first."""
    sets: tuple[SetOutlook, ...]
    """One for each kernel build, also for releases that are not selected: a tag means one image, whoever builds it."""
    tags: tuple[str, ...]
    """The tags that move. The immutable one is not known before the inputs are."""


@dataclass(frozen=True)
class Collision:
    """Two cells that would write one tag with different content."""

    tag: str
    cells: tuple[Cell, Cell]


@dataclass(frozen=True)
class Outlook:
    """The plan of a selection. Cells and images are in the order of driver, release, architecture, flavour."""

    cells: tuple[CellOutlook, ...]
    images: tuple[ImageOutlook, ...]
    collisions: tuple[Collision, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many there are: of cells by status, of images, of module sets, and of compiles (one a set and type)."""
        sets = {
            (image.driver, image.arch, image.flavor, one.package): len(one.types)
            for image in self.images
            for one in image.sets
        }
        return {
            "cells": len(self.cells),
            **{status.name.lower(): sum(one.status is status for one in self.cells) for status in Status},
            "images": len(self.images),
            "module_sets": len(sets),
            "compiles": sum(sets.values()),
        }

    def to_json(self) -> dict[str, Any]:
        """The outlook as a JSON document."""
        return {
            "cells": [{"id": one.cell.id, **asdict(one)} for one in self.cells],
            "images": [{**asdict(one), "cells": _ids(one.cells)} for one in self.images],
            "counts": self.counts,
            "collisions": [{"tag": one.tag, "cells": _ids(one.cells)} for one in self.collisions],
        }


@dataclass(frozen=True)
class Claim:
    """A cell's wish to write a tag; ``content`` is alike for two cells only if what they write is."""

    tag: str
    cell: Cell
    content: str


def make(matrices: Sequence[Matrix], cells: Iterable[Cell], made: Collection[Cell] = ()) -> Outlook:
    """Plan cells, each of one of the matrices; ``made`` are those whose image is on this machine already.

    Two cells that claim one tag are told of in the outlook: see :func:`refuse`.
    """
    chosen = sorted(set(cells), key=order)
    looked: list[CellOutlook] = []
    images: list[ImageOutlook] = []
    claims: list[Claim] = []
    for matrix in matrices:
        ours = dict.fromkeys(cell for cell in chosen if cell in matrix)
        chosen = [cell for cell in chosen if cell not in ours]
        for cell in ours:
            siblings = tuple(one for one in matrix.siblings(cell) if one in ours)
            absent = matrix.absent(cell)
            kernel = matrix.release(cell).kernel_name(cell)
            if len(absent) == len(ModuleType):
                looked.append(_outlook(cell, matrix, Status.EXCLUDED, "by rule"))
            elif kernel is None:
                looked.append(_unknown(cell, matrix, made))
            elif cell == siblings[0]:
                image, wanted = _image(matrix, siblings, kernel)
                images.append(image)
                claims += wanted
                looked += _shared(matrix, image, made)
    return Outlook(
        tuple(sorted(looked, key=lambda one: order(one.cell))),
        tuple(sorted(images, key=lambda one: order(one.cells[0]))),
        collisions(claims),
    )


def collisions(claims: Iterable[Claim]) -> tuple[Collision, ...]:
    """The pairs of cells that would write one tag with different content: of each tag its first cell, and another."""
    first: dict[str, Claim] = {}
    found = []
    for claim in claims:
        earlier = first.setdefault(claim.tag, claim)
        if earlier.content != claim.content:
            found.append(Collision(claim.tag, (earlier.cell, claim.cell)))
    return tuple(dict.fromkeys(found))


def refuse(found: Sequence[Collision]) -> None:
    """Raises ConfigurationError naming the cells of collisions, if there are any."""
    if found:
        raise ConfigurationError(
            f"tag {found[0].tag}",
            "would be written by two cells with different content",
            got=" and ".join(_ids(found[0].cells)) + (f"; {len(found) - 1} more such tags" if found[1:] else ""),
            hint="give their releases different OS tags, or take one of them out of its matrix",
        )


def _outlook(cell: Cell, matrix: Matrix, status: Status, note: str, image: ImageOutlook | None = None) -> CellOutlook:
    release = matrix.release(cell)
    return CellOutlook(
        cell=cell,
        status=status,
        kernel=release.kernel_name(cell),
        package=release.kernel,
        absent=matrix.absent(cell),
        image=image.name if image else None,
        note=note,
    )


def _unknown(cell: Cell, matrix: Matrix, made: Collection[Cell]) -> CellOutlook:
    if cell in made:
        return _outlook(cell, matrix, Status.REUSED, _HERE)
    ranges: dict[str, list[str]] = {}
    for rule in matrix.rules:
        if rule.kernel and rule.is_about(cell.driver):
            ranges.setdefault(rule.kernel, []).append(rule.module_type)
    note = "; ".join(f"{' and '.join(types)} absent if the kernel is {kernel}" for kernel, types in ranges.items())
    return _outlook(cell, matrix, Status.UNKNOWN, note)


def _image(matrix: Matrix, cells: tuple[Cell, ...], kernel: str) -> tuple[ImageOutlook, list[Claim]]:
    """The image of cells that have one, and the tags that it claims."""
    first = cells[0]
    release = matrix.release(first)
    siblings = matrix.siblings(first)
    types = tuple(one for one in ModuleType if one not in matrix.absent(first))
    builds: dict[str, list[str]] = {}
    for cell in siblings:
        builds.setdefault(matrix.release(cell).kernel or "", []).append(cell.gl)
    sets = tuple(SetOutlook(package, tuple(releases), types) for package, releases in builds.items())
    named = tags.compute(
        first,
        kernel,
        os_tag=release.os_tag,
        aliases=[matrix.alias.format(gl=cell.gl) for cell in siblings],
        owns_branch=matrix.owns_branch(first),
        key="",
    )
    moving = tuple(tag.name for tag in named if tag.moves)
    content = key_of(matrix=str(matrix.path), driver=first.driver, kernels=sorted(builds), types=types)
    name = next(tag.name for tag in named if tag.kind is TagKind.VERSION)
    image = ImageOutlook(name, first.driver, first.arch, first.flavor, kernel, release.os_tag, cells, sets, tags=moving)
    return image, [Claim(tag, first, content) for tag in moving]


def _shared(matrix: Matrix, image: ImageOutlook, made: Collection[Cell]) -> list[CellOutlook]:
    """What becomes of the cells of one image: those on this machine come first, then the oldest."""
    found: list[CellOutlook] = []
    for cell in sorted(image.cells, key=lambda one: one not in made):
        package = matrix.release(cell).kernel
        same = next((one.cell for one in found if one.package == package), None)
        if cell in made:
            status, note = Status.REUSED, _HERE
        elif same:
            status, note = Status.REUSED, f"same image as {same}: the kernel package is equal"
        elif found:
            other = found[0].cell
            status, note = Status.JOINED, f"same kernel name as {other}, another build: one image, a module set each"
        else:
            status, note = Status.BUILD, ""
        found.append(_outlook(cell, matrix, status, note, image))
    return found


def groups(outlook: Outlook, limit: int = JOBS) -> tuple[tuple[Cell, ...], ...]:
    """Share the cells out among CI jobs, at most ``limit``, with about the same work each; excluded cells have none.

    Cells that have one image are in one job, and so are those that may turn out to: of a line of releases with one
    driver, architecture and flavour, a cell whose kernel is not known goes with its neighbours, for no release has an
    older kernel than the one before. Raises ConfigurationError where ``limit`` leaves no job.
    """
    if limit < 1:
        raise ConfigurationError("jobs", "must be 1 or more", got=str(limit))
    compiles = {image.name: sum(len(one.types) for one in image.sets) for image in outlook.images}
    units: list[tuple[int, int, list[CellOutlook]]] = []  # work, how many have the same driver package before it
    before: Counter[tuple[str, ...]] = Counter()
    for unit in _units(outlook):
        units.append((_work(unit, compiles), before[_package(unit[0])], unit))
        before[_package(unit[0])] += 1
    jobs: list[list[CellOutlook]] = [[] for _ in range(min(limit, len(units)))]
    loads = [0] * len(jobs)
    for work, _, unit in sorted(units, key=lambda one: (-one[0], one[1], order(one[2][0].cell))):
        package = _package(unit[0])
        least = min(range(len(jobs)), key=lambda job: (loads[job], package not in map(_package, jobs[job]), job))
        jobs[least] += unit
        loads[least] += work
    cells = (tuple(sorted((one.cell for one in job), key=order)) for job in jobs)
    return tuple(sorted(cells, key=lambda job: order(job[0])))


def ci_matrix(jobs: Iterable[Sequence[Cell]]) -> dict[str, list[dict[str, str]]]:
    """Jobs as GitHub takes a matrix: name and cells of each."""
    return {
        "include": [
            {"name": f"{job[0]}" + (f" and {len(job) - 1} more" if job[1:] else ""), "cells": " ".join(_ids(job))}
            for job in jobs
        ]
    }


def _package(one: CellOutlook) -> tuple[str, ...]:
    """The driver package that a cell needs: worth being in one job for, as it is large."""
    return (one.cell.driver, one.cell.arch)


def _units(outlook: Outlook) -> list[list[CellOutlook]]:
    """The cells in groups that nobody may part, in their order."""
    cells = [one for one in outlook.cells if one.status is not Status.EXCLUDED]
    by_image: dict[str, list[CellOutlook]] = {}
    by_line: dict[tuple[str, ...], list[CellOutlook]] = {}
    for one in cells:
        if one.image:
            by_image.setdefault(one.image, []).append(one)
        cell = one.cell
        by_line.setdefault((cell.driver, cell.arch, cell.flavor, _line(cell)), []).append(one)
    ties = [(first, other) for first, *others in by_image.values() for other in others]
    ties += [tie for line in by_line.values() for tie in pairwise(line) if None in (tie[0].kernel, tie[1].kernel)]
    units = {one.cell: [one] for one in cells}
    for one, other in ties:
        into, of = units[one.cell], units[other.cell]
        if into is not of:
            into += of
            units |= {moved.cell: into for moved in of}
    return [unit for cell, unit in units.items() if unit[0].cell == cell]


def _work(unit: Iterable[CellOutlook], compiles: Mapping[str, int]) -> int:
    """About how much work cells are: compiles, of which each image has its number, and one more to pack and verify."""
    images = {one.image for one in unit if one.image}
    unknown = [len(ModuleType) - len(one.absent) for one in unit if not one.image]
    return sum(compiles[image] + 1 for image in images) + sum(types + 1 for types in unknown)


def show(outlook: Outlook, report: Reporter) -> None:
    """Print the outlook: a line for each image, and one for cells that have none for the same reason; then counts."""
    rows: dict[tuple[str, ...], list[CellOutlook]] = {}
    for one in outlook.cells:
        cell = one.cell
        why = () if one.image else (_line(cell), one.kernel or "", one.status, one.note)
        rows.setdefault((cell.driver, cell.arch, cell.flavor, one.image or "", *why), []).append(one)
    sets = {image.name: image.sets for image in outlook.images}
    footnotes: dict[str, int] = {}
    report.table(
        "Outlook",
        ("driver", "kernel", "arch, flavour", "releases", "becomes", "note"),
        [_row(cells, sets.get(cells[0].image or "", ()), footnotes) for cells in rows.values()],
    )
    for text, number in footnotes.items():
        report.say(f"[{number}] {text}")
    counts = outlook.counts
    became = " + ".join(f"{counts[status.name.lower()]} {status}" for status in Status)
    report.say(f"cells: {counts['cells']} = {became}", style="bold")
    report.say(
        f"images: {counts['images']}, module sets: {counts['module_sets']}, compiles: {counts['compiles']}"
        + (", besides those of what is unknown" if counts["unknown"] else "")
    )


def _row(cells: Sequence[CellOutlook], sets: Sequence[SetOutlook], footnotes: dict[str, int]) -> tuple[str, ...]:
    def footnote(text: str) -> str:
        return f"[{footnotes.setdefault(text, len(footnotes) + 1)}]"

    first = cells[0]
    notes = [f"{kind} absent {footnote(reason)}" for kind, reason in first.absent.items()]
    if len(sets) > 1:
        builds = ", ".join(f"{one.package} ({', '.join(one.releases)})" for one in sets)
        notes.append(f"{len(sets)} module sets {footnote(f'builds of one kernel name, a module set each: {builds}')}")
    selected = {one.cell.gl for one in cells}
    if others := [gl for one in sets for gl in one.releases if gl not in selected]:
        notes.append(f"also that of {', '.join(others)}")
    if here := [one.cell.gl for one in cells if one.note == _HERE]:
        notes.append(f"{_HERE}: {', '.join(here)}")
    if first.status is Status.UNKNOWN and first.note:
        notes.append(f"rules {footnote(first.note)}")
    return (
        first.cell.driver,
        first.kernel or "",
        f"{first.cell.arch} {first.cell.flavor}",
        ", ".join(one.cell.gl for one in cells),
        ", ".join(dict.fromkeys(one.status for one in cells)),
        "; ".join(notes),
    )


def _line(cell: Cell) -> str:
    """The line of releases that a cell is of, such as 1877."""
    return cell.gl.partition(".")[0]


def _ids(cells: Iterable[Cell]) -> list[str]:
    return [cell.id for cell in cells]
