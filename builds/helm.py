"""The generated parts of the Helm values: what the matrix and the settings say, in the lines that are marked for it.

A marked line is ``key: "value"  # generated: <fact>``. Its value alone is rewritten, so that every comment and every
line that a person wrote stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.version import Version

from .cache import write_atomically
from .console import Reporter
from .errors import ConfigurationError
from .matrix import Lifecycle, Matrix
from .model import ModuleType
from .settings import DEFAULTS

FOLDER = Path(__file__).parents[1] / "helm"
"""Where the project's values are. They are part of its source tree, not of the installed package."""

_MARKED = re.compile(r'^(?P<before>[ -]*[\w.-]+: )(?P<value>"[^"]*")(?P<after> +# generated: (?P<fact>.*))$')
_MARKER = "# generated:"
_SHOWN = 3
"""Files that an error shows, of those that are not current."""


def default_branch(matrix: Matrix) -> str:
    """The driver branch that the values name: the newest that has a driver on every supported node and in gVisor.

    A node is a supported release on one architecture with one flavour of the kernel. The branch has to have an image
    for each of them, as far as the rules of the matrix tell, and so has the version that gVisor pins: whoever adds the
    gVisor overlay changes the version within the branch, and loses no node. Raises ConfigurationError where no branch
    qualifies.
    """
    everywhere = built_everywhere(matrix)
    complete = [branch for branch, pinned in matrix.gvisor.items() if {branch, pinned} <= everywhere]
    if not complete:
        raise ConfigurationError(
            str(matrix.path),
            "has no driver branch for the Helm values: one with a driver, and gVisor's, on every supported release",
            got=f"branches under `gvisor:`: {', '.join(matrix.gvisor) or 'none'}",
            hint="add a driver version for the releases that lack one, or a version under `gvisor:`",
        )
    return max(complete, key=Version)


def built_everywhere(matrix: Matrix) -> set[str]:
    """The driver branches and versions that have an image for every supported node, as far as the rules tell."""
    nodes: set[tuple[str, ...]] = set()
    built: dict[str, set[tuple[str, ...]]] = {}
    for cell in matrix.cells:
        if matrix.release(cell).lifecycle is Lifecycle.SUPPORTED:
            node = (cell.gl, cell.arch, cell.flavor)
            nodes.add(node)
            if len(matrix.absent(cell)) < len(ModuleType):
                for name in (cell.driver_major, cell.driver):
                    built.setdefault(name, set()).add(node)
    return {name for name, where in built.items() if where == nodes}


def facts(release: Matrix, lab: Matrix, image_path: str) -> dict[str, str]:
    """What the marked lines can say, by the word of their marker.

    ``image_path`` is ``<registry>/<repository>``: its last part is the image, the rest the operator's repository.
    """
    if not lab.default:
        raise ConfigurationError(str(lab.path), "has no default cell, which the Helm values for a lab node need")
    repository, _, image = image_path.rpartition("/")
    branch = default_branch(release)
    return {
        "repository": repository,
        "image": image,
        "default branch": branch,
        "driver that gVisor supports": release.gvisor[branch],
        "driver version": max(_versions(release, branch), key=Version),
        "lab branch": lab.default.driver_major,
    }


def _versions(matrix: Matrix, branch: str) -> set[str]:
    return built_everywhere(matrix) & {cell.driver for cell in matrix.cells if cell.driver_major == branch}


def fill(text: str, known: Mapping[str, str], name: str) -> str:
    """A file with the values of its marked lines as they should be; ``name`` is for errors.

    Raises ConfigurationError, with the line, for a marker that names no fact or marks nothing that can be filled.
    """
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if _MARKER not in line or line.lstrip().startswith("#"):
            continue
        found = _MARKED.match(line.rstrip("\n"))
        if not found or found["fact"] not in known:
            raise ConfigurationError(
                f"{name}:{number + 1}",
                'must be `key: "value"  # generated: <fact>`',
                got=line.strip(),
                hint=f"facts: {', '.join(known)}",
            )
        lines[number] = f'{found["before"]}"{known[found["fact"]]}"{found["after"]}\n'
    return "".join(lines)


def sources(folder: Path = FOLDER) -> dict[str, str]:
    """The files with marked lines, by their paths below a folder. Raises ConfigurationError where there are none."""
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("examples/*.yaml"))]
    found = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in paths}
    if not found:
        raise ConfigurationError(str(folder), "has no values", hint="run from a checkout: pip install -e .")
    return found


def run(
    matrices: Sequence[Matrix], image_path: str, output: Path | None, report: Reporter, *, check: bool = False
) -> None:
    """Write the values into a folder, for the repository that ``image_path`` names; with ``check`` compare them only.

    With no folder, the project's own files are brought up to date. They always name the project's own repository:
    whoever exports ``IMAGE_PATH`` for a push does not want to change them. Raises ConfigurationError naming the first
    line of each file that is not current.
    """
    lab, release = matrices
    path = image_path if output else DEFAULTS["image_path"]
    known = facts(release, lab, path)
    wanted = {name: fill(text, known, f"helm/{name}") for name, text in sources().items()}
    folder = output or FOLDER
    again = f"nox -s helm -- --check{f' --output {output}' if output else ''}"
    if path != DEFAULTS["image_path"]:
        again = f"IMAGE_PATH={path} {again}"
    said = f"{known['repository']}/{known['image']}, branch {known['default branch']}"
    if not output and image_path != path:
        report.say(f"IMAGE_PATH is for values of your own: nox -s helm -- --output DIR; these name {path}")
    stale = {name: text for name, text in wanted.items() if _read(folder / name) != text}
    if check:
        if stale:
            places = [_difference(name, _read(folder / name), text) for name, text in stale.items()]
            got = "; ".join(places[:_SHOWN]) + (f"; and {len(places) - _SHOWN} more files" if places[_SHOWN:] else "")
            raise ConfigurationError(
                f"values in {folder}", "are not current", got=got, hint="without --check, it writes them", repeat=again
            )
        report.say(f"{len(wanted)} files in {folder} are current: {said}")
        return
    for name, text in stale.items():
        write_atomically(folder / name, text)
        report.say(f"wrote {folder / name}")
    report.say(f"{len(wanted) - len(stale)} of {len(wanted)} files in {folder} were current: {said}")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _difference(name: str, found: str | None, wanted: str) -> str:
    """The first line in which a file differs from what it should be."""
    if found is None:
        return f"{name} is missing"
    theirs, ours = found.splitlines(), wanted.splitlines()
    for number, (old, new) in enumerate(zip(theirs, ours, strict=False), 1):
        if old != new:
            return f"{name}:{number} has `{old.strip()}`, should be `{new.strip()}`"
    return f"{name} has {len(theirs)} lines, should have {len(ours)}"
