"""The kernel itself: what modules are loaded into, in a virtual machine, before a node does.

It comes from where its headers came from: out of the kmodbuild image, or as the package of the very same version out
of that image's package source; or from ``KERNEL_IMAGE``: a file, or a folder of Debian packages of kernels.
"""

from __future__ import annotations

import gzip
import lzma
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import zstandard
from debian.arfile import ArError
from debian.deb822 import Deb822
from debian.debfile import DebFile

from . import compile as compiling
from . import engine as engines
from . import kmod, oci
from .cache import CHUNK, Cache, file_sha256, key_of, recipe
from .console import Reporter
from .engine import Engine
from .errors import BuildError, ConfigurationError, InfrastructureError
from .model import Arch, KernelBuild
from .plan import Inputs, ModuleSet
from .rootfs import open_rootfs

_IMAGE = "vmlinuz"
_SOURCE = "source"
_STEP = "kernel-image"
_RECIPE = recipe(Path(__file__))
_PACKAGES = ("linux-image-{release}", "linux-image-unsigned-{release}")
"""How Debian and its descendants call the package of a kernel."""
_FOUND = "/out"
_NONE = 100  # status of the script below: the image has no apt
_FETCH = f"""\
command -v apt-get >/dev/null || exit {_NONE}
mkdir {_FOUND} && cd {_FOUND} || exit
[ "$(dpkg --print-architecture)" = "$ARCH" ] || dpkg --add-architecture "$ARCH"
set -- -qq -o APT::Sandbox::User=root -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20
apt-get "$@" update || exit 1
for name in $NAMES; do
    ! apt-get "$@" download "$name:$ARCH=$VERSION" || exit 0
done
exit 1
"""
"""Run in a kmodbuild container, with network: leaves the kernel's package in ``/out``."""
_UNREADABLE = (
    *(ArError, tarfile.TarError, lzma.LZMAError, zlib.error, zstandard.ZstdError),
    *(EOFError, OSError, ValueError, KeyError),
)
"""What a damaged package makes its readers raise."""


@dataclass(frozen=True)
class KernelImage:
    """A kernel that can be booted, with its own modules as far as they were to be had."""

    folder: Path

    @property
    def vmlinuz(self) -> Path:
        """What a boot loader loads."""
        return self.folder / _IMAGE

    @property
    def modules(self) -> Path:
        """The kernel's own modules: what a node has as ``/lib/modules/<release>``; empty where none were to be had."""
        return self.folder / "modules"

    @property
    def source(self) -> str:
        """Where it came from, in a few words."""
        return (self.folder / _SOURCE).read_text()

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        found = sorted(path for path in self.modules.rglob("*.ko*") if path.is_file())
        return {_name(path.name.partition(".ko")[0]): path for path in found}

    def closure(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        """The named modules and what they need, uncompressed, in an order in which they can be loaded.

        Those that the kernel has not as modules are left out: they may be built in. Raises BuildError for one that
        cannot be read.
        """
        done: dict[str, bytes] = {}
        begun: set[str] = set()

        def add(name: str) -> None:
            path = self._files.get(name)
            if path is None or name in begun:
                return
            begun.add(name)
            data = _uncompressed(path)
            for needed in depends(kmod.read_module(path.name, data)):
                add(needed)
            done[name] = data

        for name in names:
            add(_name(name))
        return list(done.items())


def depends(module: kmod.Module) -> list[str]:
    """The modules that a module says it needs, as the kernel spells them (``depends`` of its modinfo)."""
    return [_name(name) for name in (module.one("depends") or "").split(",") if name]


@dataclass(frozen=True)
class _Source:
    """Where a kernel may come from."""

    name: str
    """In a few words."""
    facts: Mapping[str, str]
    """What its content depends on."""
    fill: Callable[[Path], None]
    """Fills a folder with the kernel: ``vmlinuz``, and its own modules below ``modules/``."""


@dataclass(frozen=True)
class _Wanted:
    """A kernel build that is looked for, and where what is found of it is kept."""

    build: KernelBuild
    arch: Arch
    cache: Cache

    def __str__(self) -> str:
        return f"kernel image of {self.build.release} ({self.build.package})"

    def find(self, source: _Source) -> KernelImage | None:
        """What a source had, if it was asked before."""
        found = self.cache.find(_STEP, self._key(source))
        return KernelImage(found) if found else None

    def keep(self, source: _Source) -> KernelImage:
        """What a source has. Raises BuildError where that is no kernel of this build."""

        def make(folder: Path) -> None:
            (folder / "modules").mkdir()
            source.fill(folder)
            if not (folder / _IMAGE).is_file():
                raise BuildError(str(self), f"the {source.name} has none", got=f"no boot/vmlinuz-{self.build.release}")
            (folder / _SOURCE).write_text(source.name)

        return KernelImage(self.cache.make(_STEP, self._key(source), make)[0])

    def _key(self, source: _Source) -> str:
        return key_of(**source.facts, release=self.build.release, recipe=_RECIPE)


def find(
    of: ModuleSet,
    arch: Arch,
    inputs: Inputs,
    place: Path | None,
    *,
    engine: Engine | None,
    cache: Cache,
    report: Reporter,
) -> KernelImage:
    """The kernel of a module set: from ``place``, from its kmodbuild image, or from that image's package source.

    ``place`` is a kernel, its Debian package, or a folder of such packages.
    Raises InfrastructureError, with the reason of each source, where none has it, and ConfigurationError where
    ``place`` is a file that is not this kernel's.
    """
    wanted, kmodbuild = _Wanted(of.kernel.build, arch, cache), inputs.sets[of.id].kmodbuild
    shipped = _Source("kmodbuild image", {"image": kmodbuild.digest}, _out_of_image(wanted, kmodbuild))
    offered = _package_source(wanted, kmodbuild, engine, report)
    ways: tuple[Callable[[], KernelImage | None], ...] = (
        lambda: wanted.keep(_named(wanted, place)),
        lambda: wanted.find(shipped) or wanted.find(offered),  # neither is searched again for what the other had
        lambda: wanted.keep(shipped),
        lambda: wanted.keep(offered),
    )
    reasons = []
    for way in ways:
        try:
            if found := way():
                return found
        except (BuildError, InfrastructureError) as error:
            reasons.append(error.fact + (f" ({error.got})" if error.got else ""))
    raise InfrastructureError(
        str(wanted), "is not to be had", got="; ".join(reasons), hint="KERNEL_IMAGE=<file or folder> may name it"
    )


def _named(wanted: _Wanted, place: Path | None) -> _Source:
    """What KERNEL_IMAGE names: a package, the kernel alone, or a folder that has its package."""
    if place is None:
        raise InfrastructureError(str(wanted), "KERNEL_IMAGE is not set")
    if place.is_file() and place.suffix != ".deb":
        facts = {"sha256": file_sha256(place)}
        return _Source(f"file {place.name}", facts, lambda folder: _write(folder / _IMAGE, place.read_bytes()))
    if place.is_file() and not _fits(place, wanted):
        raise ConfigurationError(
            f"KERNEL_IMAGE {place}", f"is not the package of the {wanted} for {wanted.arch}", got=_title(place)
        )
    package = place if place.is_file() else _package_in(place, wanted)
    if package is None:
        raise InfrastructureError(str(wanted), "KERNEL_IMAGE has no package of it", got=str(place))
    return _Source(f"package {package.name}", {"sha256": file_sha256(package)}, _out_of_package(wanted, package))


def _package_source(wanted: _Wanted, kmodbuild: oci.Image, engine: Engine | None, report: Reporter) -> _Source:
    """The package source of a kmodbuild image."""
    facts = {"package": wanted.build.package, "arch": str(wanted.arch), "build": wanted.build.digest}

    def fill(folder: Path) -> None:
        if engine is None:
            raise InfrastructureError(str(wanted), "asking its package source needs a container engine")
        with report.step(f"fetch kernel image {wanted.build.package}"):
            _fetch(wanted, kmodbuild, folder, engine, report)

    return _Source("package source of the kmodbuild image", facts, fill)


def _package_in(folder: Path, wanted: _Wanted) -> Path | None:
    return next((path for path in sorted(folder.glob("linux-image-*.deb")) if _fits(path, wanted)), None)


def _fits(package: Path, wanted: _Wanted) -> bool:
    """Whether a Debian package is that of a kernel build; by what it says itself, not by the name of its file."""
    try:
        said = _control(package)
    except _UNREADABLE:
        return False
    right = said.get("Version") == wanted.build.package and said.get("Architecture") == wanted.arch
    return right and said.get("Package") in _packages(wanted)


def _packages(wanted: _Wanted) -> list[str]:
    return [name.format(release=wanted.build.release) for name in _PACKAGES]


def _title(package: Path) -> str:
    try:
        said = _control(package)
    except _UNREADABLE as error:
        return f"no readable package: {error}"
    return f"{said.get('Package')} {said.get('Version')} {said.get('Architecture')}"


def _out_of_package(wanted: _Wanted, package: Path) -> Callable[[Path], None]:
    """What fills a folder with the kernel out of its package."""

    def fill(folder: Path) -> None:
        try:
            with _part(package, "data") as archive:
                for member in archive:
                    target = _target(posixpath.normpath(member.name), wanted.build.release, folder)
                    if target and member.isfile():
                        content = archive.extractfile(member)
                        assert content
                        _write(target, content.read())
        except _UNREADABLE as error:
            if isinstance(error, OSError) and error.errno:  # the disk's, and no fault of the package
                raise
            raise BuildError(f"package {package.name}", "cannot be read", got=str(error)) from error

    return fill


@contextmanager
def _part(package: Path, name: str) -> Iterator[tarfile.TarFile]:
    """The files of one part of a Debian package: ``control`` or ``data``."""
    packed = f"{name}.tar.zst"
    with package.open("rb") as stream:
        deb: Any = DebFile(fileobj=stream)
        if packed not in deb.getnames():
            with getattr(deb, name).tgz() as archive:
                yield archive
            return
        # The library would run a command, which need not be there; and a reader of streams takes any end for the end.
        member, frame = deb.getmember(packed), zstandard.ZstdDecompressor().decompressobj()
        with tempfile.TemporaryFile() as file:
            while chunk := member.read(CHUNK):
                file.write(frame.decompress(chunk))
            if not frame.eof:
                raise EOFError(f"{packed} has no end")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield archive


def _control(package: Path) -> Mapping[str, str]:
    """What a Debian package says of itself."""
    with _part(package, "control") as archive:
        for member in archive:
            if posixpath.normpath(member.name) == "control" and (content := archive.extractfile(member)):
                return Deb822(content.read())
    raise EOFError("it has no control file")


def _out_of_image(wanted: _Wanted, image: oci.Image) -> Callable[[Path], None]:
    """What fills a folder with the kernel out of a kmodbuild image, if that has it."""

    def fill(folder: Path) -> None:
        with open_rootfs(image, wanted.cache.root / "tmp") as rootfs:
            for path, node in rootfs.nodes.items():
                target = _target(path, wanted.build.release, folder)
                if target and node.is_file:
                    _write(target, node.read())

    return fill


def _target(path: str, release: str, folder: Path) -> Path | None:
    """Where a file of a kernel's package goes; None for one of no use."""
    if path == f"boot/vmlinuz-{release}":
        return folder / _IMAGE
    inner = re.fullmatch(rf"(?:usr/)?lib/modules/{re.escape(release)}/(modules\.[a-z.]+|kernel/.+\.ko(?:\.\w+)?)", path)
    return folder / "modules" / inner[1] if inner and ".." not in path.split("/") else None


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def _fetch(wanted: _Wanted, kmodbuild: oci.Image, folder: Path, engine: Engine, report: Reporter) -> None:
    """Fill a folder with the kernel whose package the kmodbuild image's package source has."""
    environment = {
        "NAMES": " ".join(_packages(wanted)),
        "VERSION": wanted.build.package,
        "ARCH": str(wanted.arch),
    }
    name, log = compiling.load_kmodbuild(engine, kmodbuild, report), folder / "apt.log"
    with engines.container(engine, name, ["/bin/sh", "-c", _FETCH], environment=environment, network=True) as made:
        status = engines.run(made, log)
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if status == _NONE:
            raise InfrastructureError(str(wanted), "its kmodbuild image has no apt to fetch it with")
        if status:
            raise InfrastructureError(
                str(wanted),
                "its package source does not have it",
                got="; ".join([line for line in said if line.startswith("E: ")] or said[-1:]) or "no word",
            )
        engines.get_tree(made, _FOUND, folder)
    log.unlink()
    for package in folder.glob("*.deb"):
        _out_of_package(wanted, package)(folder)
        package.unlink()


def _uncompressed(path: Path) -> bytes:
    """A module as the kernel is given it."""
    data = path.read_bytes()
    try:
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".zst":
            stream = zstandard.ZstdDecompressor().decompressobj()
            plain = stream.decompress(data)
            if not stream.eof:
                raise EOFError("it has no end")
            return plain
    except _UNREADABLE as error:
        raise BuildError(f"kernel module {path.name}", "cannot be uncompressed", got=str(error)) from error
    return data


def _name(module: str) -> str:
    """The kernel's own spelling of a module's name."""
    return module.replace("-", "_")
