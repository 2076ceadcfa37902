"""What a node with NVSwitches needs besides the driver package: fabric manager, nvlsm, nscq, imex.

The vendor gives them as redistributable archives: ``redistrib_<driver version>.json`` lists them with version, size and
sha256 per platform. The table below says where the files of each go in the driver root, or why they go nowhere; a file
that no row knows is an error that names it. A component is absent by rule only where there is no source for it, by the
settings, or by what the source says; a source that cannot be asked is an error.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from posixpath import basename, dirname, normpath
from typing import Any

from . import download, http, manifest, tars
from .cache import CHUNK, Cache, disk_errors, key_of, recipe, write_atomically
from .console import Reporter
from .download import Site
from .errors import BuildError, ConfigurationError
from .manifest import Placed
from .model import Arch

_HINT = "NVIDIA_REDIST_URL names another URL or a folder, or says `none`"
_DOCUMENT_LIMIT = 4 * 1024 * 1024  # bytes; real ones have some 20 kB


@dataclass(frozen=True)
class Row:
    """Where files of an archive go. The first row that fits a file counts."""

    pattern: str
    """A path in the archive, whose last part may have wildcards; ``…/**`` is all that is below a folder."""
    dest: str | None
    """Folder of the driver root; of ``**``, with the folders below it. None: dropped."""
    reason: str = ""
    """Why files are dropped."""


@dataclass(frozen=True)
class Component:
    """One component: how the vendor lists it, and what becomes of its files."""

    name: str
    listed: tuple[str, ...]
    """Its names in the vendor's documents, of which one has it."""
    main: str
    """What it is there for: a path of the driver root, with wildcards; without it the archive was misread."""
    of_driver: bool
    """Whether it must be of the driver's very version, or refuses to work."""
    rows: tuple[Row, ...]

    @property
    def licence(self) -> str:
        """Its licence in the driver root."""
        return f"usr/share/nvidia/{self.name}/LICENSE"

    def __str__(self) -> str:
        return self.name


_BIN, _LIB = "usr/bin", "usr/lib/{triplet}"
_SYSTEMD = "systemd units of a host; the container starts what it needs itself"
_DOCS = "documentation"


def _rows(name: str, *rows: Row) -> tuple[Row, ...]:
    """The rows of a component, and those that all of them share."""
    notices = f"usr/share/nvidia/{name}"
    return (
        *rows,
        Row("LICENSE", notices),
        Row("third-party-notices.txt", notices),
        Row("usr/share/doc/third-party-notices.txt", notices),
        Row("bin/*", _BIN),
        Row("usr/bin/*", _BIN),
        Row("lib/*.so*", _LIB),
        Row("include/**", None, "headers, to compile against"),
        Row("systemd/**", None, _SYSTEMD),
        Row("lib/systemd/**", None, _SYSTEMD),
        Row("usr/lib/systemd/**", None, _SYSTEMD),
        Row("share/man/**", None, _DOCS),
        Row("share/doc/**", None, _DOCS),
        Row("usr/share/man/**", None, _DOCS),
        Row("README*", None, _DOCS),
    )


COMPONENTS = (
    Component(
        "fabricmanager",
        ("fabricmanager",),
        f"{_BIN}/nv-fabricmanager",
        True,
        _rows(
            "fabricmanager",
            Row("etc/*.cfg", "usr/share/nvidia/nvswitch"),
            Row("share/nvidia/nvswitch/**", "usr/share/nvidia/nvswitch"),
            Row("sbin/fm_run_package_installer.sh", None, "the vendor's own installer, which is not used"),
        ),
    ),
    Component(
        "nvlsm",
        ("nvlsm",),
        f"{_BIN}/nvlsm",
        False,
        _rows(
            "nvlsm",
            Row("sbin/nvlsm", _BIN),
            Row("opt/nvidia/nvlsm/sbin/nvlsm", _BIN),
            Row("opt/nvidia/nvlsm/lib/*.so*", _LIB),
            Row("share/nvidia/nvlsm/**", "usr/share/nvidia/nvlsm"),
            Row("usr/share/nvidia/nvlsm/**", "usr/share/nvidia/nvlsm"),
        ),
    ),
    Component("nscq", ("libnvidia_nscq",), f"{_LIB}/libnvidia-nscq.so.*", False, _rows("nscq")),
    Component(
        "imex",
        ("imex", "nvidia_imex"),
        f"{_BIN}/nvidia-imex",
        False,
        _rows("imex", Row("etc/nvidia-imex/*", "etc/nvidia-imex")),
    ),
)
"""The components, as the vendor's archives of branches 535 to 590 have them."""

NAMES = tuple(component.name for component in COMPONENTS)

NO_SOURCE = "there is no source for it: NVIDIA_REDIST_URL is `none`"
"""Why a component is absent by the setting."""

_PLATFORMS = {Arch.AMD64: ("linux-x86_64",), Arch.ARM64: ("linux-sbsa", "linux-aarch64")}
"""The vendor's names of a platform. Servers are ``sbsa``; ``aarch64`` has been boards and, once, everything."""


@dataclass(frozen=True)
class Listed:
    """An archive as the vendor's document lists it."""

    path: str
    """Where it is, relative to the document."""
    version: str
    sha256: str
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Resolved:
    """The components of a driver version: those that there are, unpacked, and why there are no others."""

    listed: Mapping[str, Listed]
    trees: Mapping[str, Path]
    absent: Mapping[str, str]


def resolve(base: str | None, version: str, arch: Arch, cache: Cache, report: Reporter) -> Resolved:
    """The components of a driver version for an architecture, fetched, checked and unpacked.

    ``base`` is a URL or folder with ``redistrib_<version>.json`` and the archives; None: there is no source. Raises
    InfrastructureError where the source cannot be asked, BuildError for a document that is not understood, an archive
    that is not what it says, and a fabric manager of another version; ConfigurationError for an archive that is not
    where the document says, and for a folder that is none.
    """
    if base is None:
        return Resolved({}, {}, dict.fromkeys(NAMES, NO_SOURCE))
    name = f"redistrib_{version}.json"
    source = _Source(base.rstrip("/"), Site(cache.root / "downloads", report))
    text = source.document(name)
    if text is None:
        return Resolved({}, {}, dict.fromkeys(NAMES, f"its source has no {name}"))
    listed, absent = parse(text, version, arch, name)
    trees = {component: _unpacked(component, one, source, name, cache) for component, one in listed.items()}
    return Resolved(listed, trees, absent)


def parse(text: str, version: str, arch: Arch, name: str) -> tuple[dict[str, Listed], dict[str, str]]:
    """The archives that a document lists for an architecture, by component, and why it lists no others.

    Raises BuildError for a document that is not understood, and for a fabric manager of another driver's version.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildError(name, "is no JSON document", got=repr(text[:60])) from error
    if not isinstance(document, dict):
        raise BuildError(name, "is no list of components", got=type(document).__name__)
    listed: dict[str, Listed] = {}
    absent: dict[str, str] = {}
    for component in COMPONENTS:
        entry = next((document[key] for key in component.listed if key in document), None)
        if entry is None:
            absent[component.name] = f"{name} does not list it"
            continue
        if not isinstance(entry, dict):
            raise BuildError(f"{name}: {component.name}", "is no component", got=repr(entry)[:80])
        platform = next((key for key in _PLATFORMS[arch] if key in entry), None)
        if platform is None:
            absent[component.name] = f"{name} lists it for other platforms than {_PLATFORMS[arch][0]}"
            continue
        listed[component.name] = _listed(f"{name}: {component.name}", entry.get("version"), entry[platform])
        if component.of_driver and listed[component.name].version != version:
            raise BuildError(
                f"{name}: {component.name}",
                f"must be of the driver's version {version}, or it does not start",
                got=listed[component.name].version,
            )
    return listed, absent


def select(tree: Path, component: Component, arch: Arch) -> tuple[Placed, ...]:
    """Files and links of a component in the driver root, sorted by place, SONAME links included.

    Raises BuildError that names every file of the archive that the table neither places nor drops, and for an archive
    without what the component is there for, or without its licence.
    """
    placed: dict[str, Placed] = {}
    unknown: list[str] = []
    for path in _files(tree):
        row = next((row for row in component.rows if _fits(path, row.pattern)), None)
        if row is None:
            unknown.append(path)
        elif row.dest is not None:
            one = _place(tree, path, row, component.name, arch)
            other = placed.setdefault(one.dest, one)
            if not _same(tree, other, one):
                raise BuildError(component.name, f"has two files for {one.dest}", got=f"{other.source}, {one.source}")
    if unknown:
        raise BuildError(
            component.name,
            "its archive has files that cannot be placed",
            got=", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""),
            hint="say in builds/components.py where they go",
        )
    chosen = tuple(placed[dest] for dest in sorted(placed))
    chosen += tuple(replace(link, component=component.name) for link in manifest.soname_links(chosen, tree))
    lacking = [
        wanted
        for wanted in (component.main.format(triplet=arch.triplet), component.licence)
        if not any(one.source is not None and fnmatchcase(one.dest, wanted) for one in chosen)
    ]
    places = {one.dest for one in chosen}
    lacking += [
        f"{one.dest}: its target {one.target}"
        for one in chosen
        if one.target is not None and normpath(f"{dirname(one.dest)}/{one.target}") not in places
    ]
    if lacking:
        raise BuildError(component.name, "its archive lacks what it is there for", got=", ".join(lacking))
    return chosen


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive, without the one folder that holds everything. Raises BuildError for one that is damaged."""
    # LookupError of a hard link to nothing, OverflowError of a time that no file can have, OSError of a file in a file.
    damage = (
        *(tarfile.TarError, lzma.LZMAError, zlib.error),
        *(EOFError, LookupError, ValueError, OverflowError, OSError),
    )
    try:
        with disk_errors(archive.name, folder), tarfile.open(archive, "r:*") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not parts or member.name.startswith("/") or ".." in parts:
                    raise tarfile.ExtractError(f"{member.name} leads out of it")
                tars.extract(tar, member, folder)
    except damage as error:
        raise BuildError(archive.name, "cannot be unpacked", got=str(error)) from error
    tops = list(folder.iterdir())
    if len(tops) != 1 or not tops[0].is_dir() or tops[0].is_symlink():
        raise BuildError(archive.name, "must hold one folder", got=", ".join(sorted(top.name for top in tops)[:5]))
    top = tops[0].rename(folder / ".top")
    for child in list(top.iterdir()):
        child.rename(folder / child.name)
    top.rmdir()


@dataclass(frozen=True)
class _Source:
    """Where documents and archives are: a server, or a folder that mirrors one."""

    base: str
    site: Site

    def document(self, name: str) -> str | None:
        """A document; None where the source says that it has none."""
        if not download.is_remote(self.base):
            folder = download.local(self.base)
            if not folder.is_dir():
                raise ConfigurationError("NVIDIA_REDIST_URL", "names no folder", got=str(folder), hint=_HINT)
            path = folder / name
            return path.read_text("utf-8", "replace") if path.is_file() else None
        url = f"{self.base}/{name}"
        with self.site.alone(url, name):
            known = self.site.known(url)
            if known and (kept := self.site.find(known.sha256, name)):
                return kept.read_text("utf-8", "replace")
            text = download.text(url, _DOCUMENT_LIMIT, self.site, _HINT)
            if text is None:
                return None
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:  # not kept, or a server's mistake would stay with us
                raise BuildError(http.public(url), "is no JSON document", got=repr(text[:60]), hint=_HINT) from error
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            write_atomically(self.site.path(sha256, name), text)
            self.site.remember(url, sha256, name, "own")
            return text

    def archive(self, one: Listed, document: str) -> Path:
        """An archive, proven to be the one that a document lists."""
        name = basename(one.path)

        def check(path: Path) -> str:
            return _check(path, name, one, document, self.site.report)

        if not download.is_remote(self.base):
            path = download.local(self.base) / one.path
            if not path.is_file():
                raise _nowhere(str(path), document)
            check(path)
            return path
        url = f"{self.base}/{one.path}"
        with self.site.alone(url, name):
            if kept := self.site.find(one.sha256, name):
                return kept
            try:
                return download.fetch(
                    url, name, check, self.site, absent=_nowhere(http.public(url), document), hint=_HINT
                )[0]
            except (BuildError, ConfigurationError):
                # Document and archive do not fit: whichever of them is mended, the next run is to see it.
                self.site.forget(f"{self.base}/{document}")
                raise


def _nowhere(place: str, document: str) -> ConfigurationError:
    return ConfigurationError(
        place, "there is no such archive", got=f"{document} lists it", hint=f"complete the mirror; {_HINT}"
    )


def _check(path: Path, name: str, one: Listed, document: str, report: Reporter) -> str:
    """Prove that a file has the size and sha256 that a document lists; its sha256."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with report.bytes(f"check {name}", size) as advance, path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    for what, wanted, got in (("size", one.size, size), ("sha256", one.sha256, digest.hexdigest())):
        if wanted != got:
            raise BuildError(name, f"is not the archive that {document} lists: its {what} is {wanted}", got=str(got))
    return one.sha256


def _unpacked(component: str, one: Listed, source: _Source, document: str, cache: Cache) -> Path:
    """The files of an archive, unpacked once."""
    key = key_of(archive=one.sha256, recipe=recipe(Path(__file__), Path(tars.__file__)))
    if found := cache.find_whole("components", key):
        return found
    report = source.site.report
    archive = source.archive(one, document)

    def make(folder: Path) -> None:
        with report.step(f"unpack {component}") as step:
            unpack(archive, folder)
            step.note(one.version)

    return cache.make("components", key, make, proven=True)[0]


def _listed(subject: str, version: object, entry: object) -> Listed:
    """Read what a document says of an archive. Raises BuildError that names whatever is wrong with it."""
    values: dict[str, Any] = {"version": version, **(entry if isinstance(entry, dict) else {})}
    values["size"] = str(values.get("size", ""))  # documents have it as text
    problems = [
        f"{name} {values.get(name)!r}"
        for name, pattern in (
            ("version", r"\d[0-9A-Za-z.]*"),
            ("relative_path", r"(?!/)(?:(?!\.\./)[\w.+-]+/)*[\w+-][\w.+-]*"),
            ("sha256", r"[0-9a-fA-F]{64}"),
            ("size", r"[1-9]\d{0,14}"),
        )
        if not (isinstance(value := values.get(name), str) and re.fullmatch(pattern, value))
    ]
    if problems:
        raise BuildError(subject, "is not listed as an archive should be", got=", ".join(problems)[:300])
    return Listed(values["relative_path"], values["version"], values["sha256"].lower(), int(values["size"]))


def _files(tree: Path) -> Iterator[str]:
    """Every file and link of a folder, sorted."""
    found = []
    for place, folders, files in os.walk(tree):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(Path(place) / name).relative_to(tree).as_posix() for name in (*files, *links)]
    return iter(sorted(path for path in found if path != _DIGESTS))


_DIGESTS = ".sha256.json"  # the cache's own


def _fits(path: str, pattern: str) -> bool:
    if pattern.endswith("/**"):
        return path.startswith(pattern[:-2])
    return dirname(path) == dirname(pattern) and fnmatchcase(basename(path), basename(pattern))


def _place(tree: Path, path: str, row: Row, component: str, arch: Arch) -> Placed:
    assert row.dest is not None
    below = path.removeprefix(row.pattern[:-2]) if row.pattern.endswith("/**") else basename(path)
    dest = f"{row.dest.format(triplet=arch.triplet)}/{below}"
    file = tree / path
    if file.is_symlink():
        return Placed(dest, None, str(file.readlink()), 0o777, None, component)
    executable = row.dest == _BIN or file.stat().st_mode & 0o111
    return Placed(dest, path, None, 0o755 if executable else 0o644, None, component)


def _same(tree: Path, one: Placed, other: Placed) -> bool:
    """Whether two entries for one place are alike: archives have had the same file in two folders."""
    if one is other:
        return True
    if one.source is None or other.source is None:
        return one.target == other.target
    return (tree / one.source).read_bytes() == (tree / other.source).read_bytes()
