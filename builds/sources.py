"""Where the inputs of a cell come from: registries and layouts, download sites and folders.

The result of resolving an input is always a digest and local bytes; nothing after this module knows places.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import download, http, oci, registry, runfile
from .cache import Cache
from .console import Reporter
from .download import Known, Site
from .errors import BuildError, ConfigurationError
from .model import Arch

_HINT = "NVIDIA_BASE_URL names another URL, a folder, or a package file"
_SUM = ".sha256sum"
_SUM_LIMIT = 64 * 1024  # bytes of a list of checksums


class Checksum(enum.StrEnum):
    """Who says which bytes a driver package has to have."""

    PINNED = "pinned"
    """The matrix file."""
    PUBLISHED = "published"
    """Whoever gives it: the ``.sha256sum`` beside it."""
    OWN = "own"
    """Nobody but itself, by the CRC and MD5 in its header: it is whole, but of whoever made it."""


@dataclass(frozen=True)
class DriverPackage:
    """A driver package on disk, checked."""

    path: Path
    name: str
    sha256: str
    size: int
    """In bytes."""
    checksum: Checksum


def image(reference: str, arch: Arch | None, cache: Cache, report: Reporter, *, others: bool = False) -> oci.Image:
    """The image that a reference names: ``oci:<folder>[:<name>]`` or one in a registry.

    ``arch`` picks one of several; with None whatever it names is taken, as long as there is but one. So it is with
    ``others``, where there is none of that architecture.
    Raises ConfigurationError where there is no such image, InfrastructureError where nobody can say.
    """
    if reference.startswith("oci:"):
        folder, name = split_layout(reference.removeprefix("oci:"))
        return oci.find_image(folder, name, arch, others=others)
    return registry.pull(registry.Reference.parse(reference), arch, cache.root / "images", report, others=others)


def kmodbuild(reference: str, arch: Arch, cache: Cache, report: Reporter) -> oci.Image:
    """The kmodbuild image for a cell's architecture: the one of that architecture, else the only one there is.

    The latter compiles for another architecture than its own, or the kernel's facts say why not. Which of them it is
    depends on what the reference names, never on this machine. Raises as :func:`image` does.
    """
    return image(reference, arch, cache, report, others=True)


def split_layout(text: str) -> tuple[Path, str | None]:
    """Folder and name of ``<folder>[:<name>]``. Either may have colons of its own: the layout that exists counts."""
    parts = text.split(":")
    splits = [(":".join(parts[:end]), ":".join(parts[end:]) or None) for end in range(1, len(parts) + 1)]
    folder, name = next((split for split in splits if (Path(split[0]) / "oci-layout").is_file()), splits[0])
    return Path(folder).expanduser().absolute(), name


def driver_package(
    base: str,
    version: str,
    arch: Arch,
    pin: str | None,
    cache: Cache,
    report: Reporter,
    *,
    vouched: bool = False,
) -> DriverPackage:
    """The driver package of a version and architecture, downloaded if it must be, and checked.

    ``base`` is a URL or folder that holds ``<version>/<package>``, or one package file by URL or path. ``pin`` is the
    sha256 that the matrix demands; without one, the package's must be the one that its ``.sha256sum`` publishes.
    Raises BuildError where the package is not whole, not the one that was asked for, or (if ``vouched``) nobody
    vouches for its bytes; ConfigurationError where there is none.
    """
    name = runfile.package_name(version, arch)

    def check(path: Path, sha256: str | None) -> str:
        with report.bytes(f"check {name}", path.stat().st_size) as advance:
            header = runfile.read_header(path)
            return runfile.check(path, header, version=version, arch=arch, sha256=sha256, progress=advance)

    if download.is_remote(base):
        url = base if base.endswith(".run") else f"{base}/{version}/{name}"
        site = Site(cache.root / "downloads", report)
        with site.alone(url, name):
            path, sha256, checksum = _downloaded(url, name, pin, check, site, vouched)
    else:
        path = _local(download.local(base), version, name)
        beside = path.with_name(path.name + _SUM)
        published = None if pin or not beside.is_file() else parse_sha256sum(_read(beside), path.name, str(beside))
        checksum = _checksum(pin, published)
        _refuse_unvouched(name, checksum, vouched)
        sha256 = check(path, pin or published)
    report.say(f"  {name}: sha256 {sha256[:12]} {_SAID[checksum]}")
    return DriverPackage(path, name, sha256, path.stat().st_size, checksum)


_SAID = {
    Checksum.PINNED: "is the one that the matrix pins",
    Checksum.PUBLISHED: f"is the one in its {_SUM}",
    Checksum.OWN: "is known from nowhere else: only the package's own checksums were compared",
}


def parse_sha256sum(text: str, name: str, where: str) -> str:
    """The sha256 of a file in what ``sha256sum`` writes, with GNU's lines or BSD's, or in a checksum alone.

    Raises BuildError for what is no such list (a server's web page, say), does not name the file, or names it twice.
    """
    listed: set[str] = set()
    for line in filter(None, map(str.strip, text.splitlines())):
        found = re.fullmatch(r"\\?(?P<hex>[0-9a-fA-F]{64})(?:\s+\*?(?P<name>.+))?", line) or re.fullmatch(
            r"SHA256 ?\((?P<name>.+)\) ?= ?(?P<hex>[0-9a-fA-F]{64})", line
        )
        if not found:
            raise BuildError(where, "is no list of sha256 checksums", got=repr(line[:80]))
        if found["name"] is None or found["name"].rpartition("/")[2] == name:
            listed.add(found["hex"].lower())
    if len(listed) != 1:
        raise BuildError(where, f"has no one checksum of {name}", got=f"{len(listed)} of them")
    return listed.pop()


def _downloaded(
    url: str, name: str, pin: str | None, check: Callable[[Path, str | None], str], site: Site, vouched: bool
) -> tuple[Path, str, Checksum]:
    """A package from a server; from the cache, and without asking anybody, where it is known which bytes it has."""
    known = site.known(url)
    if pin and (path := _proven(pin, name, check, site)):
        return path, pin, Checksum.PINNED
    trusted = known and not pin and (known.checksum == Checksum.PUBLISHED or not vouched)
    if known and trusted and (path := _proven(known.sha256, name, check, site)):
        return path, known.sha256, _checksum(None, known.sha256 if known.checksum == Checksum.PUBLISHED else None)
    published = None if pin else _published(url, name, known, site, vouched)
    checksum = _checksum(pin, published)
    expected = pin or published or (known.sha256 if known else None)
    sha256 = expected or ""
    path = _proven(sha256, name, check, site) if sha256 else None
    if path is None:
        if published:
            site.report.say(f"  {name}: its {_SUM} says {published[:12]}")
        absent = ConfigurationError(
            http.public(url), "there is no such driver package", got="404 Not Found", hint="is the version right?"
        )
        path, sha256 = download.fetch(url, name, lambda part: check(part, expected), site, absent=absent, hint=_HINT)
    _refuse_unvouched(name, checksum, vouched)  # one that was withdrawn meanwhile is in the cache all the same
    if not pin:  # what a pin says is the matrix's to remember
        site.remember(url, sha256, name, checksum)
    return path, sha256, checksum


def _published(url: str, name: str, known: Known | None, site: Site, vouched: bool) -> str | None:
    """The sha256 that stands beside a package on its server, if one does."""
    place = http.public(url + _SUM)
    # Stores that keep others out answer 403 for what is not there; who must have a checksum has to know that.
    text = download.text(url + _SUM, _SUM_LIMIT, site, _HINT, none=(404, 410) if vouched else (403, 404, 410))
    if text is None:
        if vouched and download.exists(url, site, _HINT):  # one that is not there has no checksum either: said as such
            _refuse_unvouched(name, Checksum.OWN, vouched)
        return None
    published = parse_sha256sum(text, name, place)
    if known and known.sha256 != published:
        raise BuildError(
            place,
            f"says another sha256 than that of the file that was downloaded before, {known.sha256[:12]}",
            got=published[:12],
            hint="the vendor does not change a package: pin the right sha256 in the matrix file",
        )
    return published


def _proven(sha256: str, name: str, check: Callable[[Path, str | None], str], site: Site) -> Path | None:
    """A package of these bytes in the cache, checked like one that just came; one that is damaged is removed."""
    path = site.path(sha256, name)
    if not path.is_file():
        return None
    try:
        check(path, sha256)
    except BuildError as error:
        site.drop(path, error.fact)
        return None
    return path


def _checksum(pin: str | None, published: str | None) -> Checksum:
    return Checksum.PINNED if pin else Checksum.PUBLISHED if published else Checksum.OWN


def _refuse_unvouched(name: str, checksum: Checksum, vouched: bool) -> None:
    if vouched and checksum is Checksum.OWN:
        raise BuildError(
            name,
            "nobody vouches for its bytes: no sha256 of it is pinned or published",
            hint=f"pin it in the matrix file, put a {_SUM} beside it, or say PACKAGE_SHA256=optional",
        )


def _local(base: Path, version: str, name: str) -> Path:
    if base.is_file():
        return base
    for path in (base / version / name, base / name):
        if path.is_file():
            return path
    raise ConfigurationError(
        f"driver package {name}",
        f"is not in {base}",
        hint="NVIDIA_BASE_URL names a folder or URL that holds <version>/<package>, or one package file",
    )


def _read(path: Path) -> str:
    """A small text of this machine."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError as error:
        raise BuildError(str(path), "cannot be read", got=error.strerror) from error
