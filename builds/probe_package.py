"""Reads one driver package and says whether every field of it was understood: a new branch, checked in a minute.

Nothing is built and nothing of the package is run. What it finds strange it collects, to say all of it at once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import classic_flow, manifest, runfile, sources
from .cache import Cache, disk_errors, file_sha256, scratch
from .console import Reporter, human_size
from .errors import BuildError, ConfigurationError
from .manifest import Manifest, ManifestEntry, Placed
from .model import Arch, ModuleType
from .runfile import RunHeader

_SHOWN = 20  # names that a list shows people; --json has all


@dataclass(frozen=True)
class Content:
    """What a driver tree holds, and what of it makes no sense."""

    manifest: Manifest
    types: Mapping[str, int]
    """Number of entries by type."""
    module_types: tuple[ModuleType, ...]
    """The types whose sources are there."""
    selected: tuple[Placed, ...]
    """What an image takes."""
    dropped: tuple[tuple[ManifestEntry, str], ...]
    """What an image does not take, each with the reason."""
    missing: tuple[str, ...]
    """What the manifest promises, one phrase each, and the tree does not hold."""
    unnamed: tuple[str, ...]
    """Files of the tree that its manifest does not name. They are in no image; the vendor's packages have some."""
    problems: tuple[str, ...]
    """What was not understood: unknown types, malformed lines, contradictions."""


@dataclass(frozen=True)
class Findings:
    """What a driver package says of itself, and what it holds."""

    name: str
    size: int
    """In bytes."""
    sha256: str
    arch: Arch
    header: RunHeader
    checksums: Mapping[str, str]
    """``ok`` or ``not given``, by the checksum's name. A wrong one is an error, not a finding."""
    payload: str
    """Format of the payload."""
    content: Content

    @property
    def problems(self) -> tuple[str, ...]:
        """What was not understood, and what is promised and not there."""
        header, inner = self.header, self.content.manifest.version
        problems = [*self.content.problems, *self.content.missing]
        if header.version != inner:
            problems.append(f"the header says version {header.version}, the manifest {inner}")
        if header.decompressor and sum(header.decompressor) != header.skip:
            first, size = header.decompressor
            problems.append(f"{size} lines of decompressor from line {first} on do not end at line {header.skip}")
        return tuple(problems)

    def to_json(self) -> dict[str, Any]:
        """The findings as a JSON document."""
        content = self.content
        return {
            **{name: getattr(self, name) for name in ("name", "size", "sha256", "arch", "payload", "problems")},
            "header": asdict(self.header),
            "checksums": dict(self.checksums),
            "description": content.manifest.description,
            "version": content.manifest.version,
            "kernel_modules": content.manifest.module_names,
            "types": dict(content.types),
            "module_types": content.module_types,
            "selected": [
                {"dest": one.dest, "source": one.source, "target": one.target, "type": one.entry and one.entry.type}
                for one in content.selected
            ],
            "dropped": [{"path": one.path, "type": one.type, "reason": reason} for one, reason in content.dropped],
            "missing": content.missing,
            "unnamed": content.unnamed,
        }


def run(
    package: str,
    arch: Arch | None,
    base_url: str,
    cache: Cache,
    report: Reporter,
    *,
    as_json: bool = False,
    differences: bool = False,
) -> None:
    """Probe a package, by file or version, and print what was found: for people, or on standard output for machines.

    Raises BuildError where it is damaged, or not understood in every field.
    """
    found = probe(find(package, arch, base_url, cache, report), arch, cache, report)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    elif differences:
        content = found.content
        print(classic_flow.differences(content.manifest, found.arch, content.selected, content.dropped), end="")
    else:
        show(found, report)
    if problems := found.problems:
        raise BuildError(
            found.name,
            f"is not understood, in {len(problems)} point{'s' if len(problems) > 1 else ''}",
            got="; ".join(problems),
            hint="builds/manifest.py has the types of entries and where they go, builds/runfile.py the header",
        )


def find(package: str, arch: Arch | None, base_url: str, cache: Cache, report: Reporter) -> Path:
    """The file of a package: the one that is named, or a version's from where NVIDIA_BASE_URL leads.

    ``arch`` None is amd64. Raises ConfigurationError for what is neither a file nor a version.
    """
    path = Path(package)
    if path.is_file():
        return path
    if not re.fullmatch(r"\d+(\.\d+)+", package):
        raise ConfigurationError("driver package", "must be a file or a version such as 570.172.08", got=repr(package))
    return sources.driver_package(base_url, package, arch or Arch.AMD64, None, cache, report).path


def probe(path: Path, arch: Arch | None, cache: Cache, report: Reporter) -> Findings:
    """Read a package file, check it, unpack it, and look at everything in it. Raises BuildError if it is damaged."""
    header = runfile.read_header(path)
    of = next((one for one in Arch if one.machine == header.machine), None)
    if of is None:
        raise BuildError(path.name, "is of no architecture that is known here", got=header.machine)
    sha256 = _check(path, header, arch or of, report)
    with _unpacked(path, header, cache, report) as tree:
        return Findings(
            name=path.name,
            size=path.stat().st_size,
            sha256=sha256,
            arch=of,
            header=header,
            checksums={
                "CRC": "not given" if header.crc is None else "ok",
                "MD5": "not given" if header.md5 is None else "ok",
            },
            payload=runfile.payload_format(path, header),
            content=examine(tree, of),
        )


def examine(tree: Path, arch: Arch) -> Content:
    """Look at a driver tree. Raises BuildError where it has no manifest that can be read at all."""
    try:
        text = (tree / ".manifest").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(".manifest", "cannot be read", got=str(error)) from error
    read, problems = manifest.read(text)
    selected: tuple[Placed, ...] = ()
    dropped: tuple[tuple[ManifestEntry, str], ...] = ()
    try:
        selected = manifest.select(read, arch)
        dropped = manifest.dropped(read, arch)
    except BuildError as error:
        problems += (_phrase(error),)
    lacking = manifest.missing(read, selected, tree) if selected else ()
    # Of what is dropped nobody would miss a file; that the manifest speaks of one all the same is worth knowing.
    lacking += tuple(f"{one.path}: not in the package" for one, _ in dropped if not _is_there(one, tree))
    try:
        selected += manifest.soname_links(tuple(one for one in selected if not _lacks(one, tree)), tree)
    except BuildError as error:
        problems += (_phrase(error),)
    named = {entry.path for entry in read.entries}
    files = (path.relative_to(tree).as_posix() for path in sorted(tree.rglob("*")) if not path.is_dir())
    return Content(
        manifest=read,
        types=dict(sorted(Counter(entry.type for entry in read.entries).items())),
        module_types=tuple(one for one in ModuleType if (tree / one.source_folder / "Makefile").is_file()),
        selected=selected,
        dropped=dropped,
        missing=tuple(dict.fromkeys(lacking)),
        unnamed=tuple(path for path in files if path not in named and path != ".manifest"),
        problems=problems,
    )


def show(found: Findings, report: Reporter) -> None:
    """Print findings for people."""
    header, content = found.header, found.content
    embedded = header.decompressor and f"lines {header.decompressor[0]} to {sum(header.decompressor) - 1}, not run"
    reasons = Counter(reason for _, reason in content.dropped)
    links = sum(one.target is not None for one in content.selected)
    entries = f"{len(content.manifest.entries)} entries"
    rows = [
        ("package", f"{human_size(found.size)}, sha256 {found.sha256}"),
        ("label", header.label),
        ("header", f"{header.target_os}, {header.machine}, {header.version}, payload from line {header.skip} on"),
        ("checksums", ", ".join(f"{name} {verdict}" for name, verdict in found.checksums.items())),
        ("payload", found.payload + (f"; embedded decompressor: {embedded}" if embedded else "")),
        ("manifest", f"{content.manifest.description}, {content.manifest.version}, {entries}"),
        ("modules", ", ".join(f"{one} ({one.source_folder})" for one in content.module_types) or "none"),
        ("types", "\n".join(f"{count:5} {name}" for name, count in content.types.items())),
        ("selected", f"{len(content.selected) - links} files, {links} links"),
        ("dropped", "\n".join(f"{count:5} {reason}" for reason, count in reasons.most_common())),
        ("not named", _list(content.unnamed)),
        ("missing", _list(content.missing)),
        ("not understood", _list(content.problems)),
    ]
    report.table(found.name, ("what", "found"), rows)
    if not found.problems:
        report.say(f"{found.name}: every field was understood", style="green")


def _check(path: Path, header: RunHeader, arch: Arch, report: Reporter) -> str:
    """The sha256 of a package whose own checksums, as far as it has any, were found right."""
    with report.bytes(f"check {path.name}", path.stat().st_size) as advance:
        if header.crc is None and header.md5 is None:
            pin = file_sha256(path)  # there is nothing to hold it against: found as it is
            return runfile.check(path, header, version=header.version, arch=arch, sha256=pin, progress=advance)
        return runfile.check(path, header, version=header.version, arch=arch, sha256=None, progress=advance)


@contextmanager
def _unpacked(path: Path, header: RunHeader, cache: Cache, report: Reporter) -> Iterator[Path]:
    place = cache.root / "probe"
    with disk_errors("probe-package", place), scratch(place) as folder:
        tree = folder / "tree"
        with report.bytes("unpack", None) as advance:
            runfile.unpack(path, header, tree, progress=advance)
        yield tree


def _is_there(entry: ManifestEntry, tree: Path) -> bool:
    return entry.target is not None or (tree / entry.path).is_file()


def _lacks(one: Placed, tree: Path) -> bool:
    return one.source is not None and not (tree / one.source).is_file()


def _phrase(error: BuildError) -> str:
    return f"{error.subject} {error.fact}" + (f": {error.got}" if error.got else "")


def _list(names: tuple[str, ...]) -> str:
    more = len(names) - _SHOWN
    return "\n".join((*names[:_SHOWN], *([f"and {more} more: --json has all"] if more > 0 else []))) or "none"
