"""Where the inputs of a cell come from: registries and layouts, download sites and folders.

The result of resolving an input is always a digest and local bytes; nothing after this module knows places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from . import http, oci, registry, runfile
from .cache import CHUNK, Cache, disk_errors, locked
from .console import Reporter
from .errors import BuildError, ConfigurationError, InfrastructureError
from .model import Arch


@dataclass(frozen=True)
class DriverPackage:
    """A driver package on disk, checked."""

    path: Path
    name: str
    sha256: str
    size: int
    """In bytes."""


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
    base: str, version: str, arch: Arch, pin: str | None, cache: Cache, report: Reporter
) -> DriverPackage:
    """The driver package of a version and architecture, downloaded if it must be, and checked.

    ``base`` is a URL or folder that holds ``<version>/<package>`` (or the package itself), or one package file.
    ``pin`` is the sha256 that the matrix demands. Raises BuildError where the package is not whole, or not the
    one that was asked for.
    """
    name = runfile.package_name(version, arch)
    downloaded = base.startswith(("http://", "https://"))
    if downloaded:
        path = _download(f"{base}/{version}/{name}", cache.root / "downloads" / name, report)
    else:
        path = _local(Path(base.removeprefix("file://")).expanduser(), version, name)
    size = path.stat().st_size
    try:
        with report.bytes(f"check {name}", size) as advance:
            header = runfile.read_header(path)
            sha256 = runfile.check(path, header, version=version, arch=arch, sha256=pin, progress=advance)
    except BuildError:
        if downloaded:  # or a server's mistake would stay with us after it is mended
            path.unlink(missing_ok=True)
        raise
    return DriverPackage(path, name, sha256, size)


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


def _download(url: str, target: Path, report: Reporter) -> Path:
    """Download a file once: under a temporary name, with status and length checked."""
    with disk_errors(target.name, target.parent), locked(target):
        if target.is_file():
            return target
        temporary = target.with_name(target.name + ".part")
        try:
            http.retrying(f"download {target.name}", report.say)(_fetch, url, temporary, report)
        except requests.RequestException as error:
            raise InfrastructureError(
                http.public(url),
                "the server keeps failing" if error.response is not None else "cannot be downloaded",
                got=http.reason(error),
                hint="NVIDIA_BASE_URL names another URL, a folder, or a package file",
            ) from error
        temporary.rename(target)
        return target


def _fetch(url: str, target: Path, report: Reporter) -> None:
    """One try at a download, with status and length checked."""
    place = http.public(url)
    with http.prepare(requests.Session()) as session, session.get(url, stream=True) as response:
        http.check(response)
        if response.status_code == 404:
            raise ConfigurationError(
                place, "there is no such driver package", got="404 Not Found", hint="is the version right?"
            )
        if response.status_code != 200:
            raise InfrastructureError(place, "the server refuses", got=http.status(response))
        promised = int(response.headers.get("Content-Length", 0)) or None
        with report.bytes(f"download {target.name}", promised) as advance:
            written = _spill(response, target, advance)
    if promised and written != promised:
        raise InfrastructureError(
            place, f"the download ended early: {promised} bytes were promised", got=f"{written} bytes"
        )


def _spill(response: requests.Response, target: Path, advance: Callable[[int], None]) -> int:
    written = 0
    with target.open("wb") as file:
        for chunk in response.iter_content(CHUNK):
            written += file.write(chunk)
            advance(len(chunk))
    return written
