"""What a kmodbuild image says of its kernel and its compiler, read from its layers and never guessed.

A kernel is known by its headers: ``utsrelease.h`` has the release name, ``version.h`` the upstream version,
``Module.symvers`` every exported symbol with its CRC, ``.config`` the configuration.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from debian.deb822 import Deb822

from . import oci
from .cache import Cache, key_of, recipe
from .console import Reporter
from .errors import BuildError
from .model import Arch, Cell, Flavor, KernelBuild
from .rootfs import RootFs, open_rootfs

_COMPILER = re.compile(
    r"(gcc|cpp|clang|llvm|lld|binutils|libbinutils|make|pahole|dwarves|linux-kbuild|linux-compiler)(-.*)?"
)
_CONFIG_OF_ARCH = {Arch.AMD64: "CONFIG_X86_64", Arch.ARM64: "CONFIG_ARM64"}


@dataclass(frozen=True)
class Kernel:
    """A kernel build, and how to compile modules for it in its kmodbuild image."""

    build: KernelBuild
    source: str
    """``SYSSRC``: folder of the headers that all flavours share."""
    output: str
    """``SYSOUT``: folder of the flavour's own headers, where ``Module.symvers`` is."""
    compiler: Mapping[str, str]
    """Version of every package whose tools make the modules."""
    drm: bool
    """Whether the kernel has DRM: without it nvidia-drm is an empty module."""
    cross: str = ""
    """``CROSS_COMPILE``: what the compiler's name begins with, such as ``aarch64-linux-gnu-``, in an image of another
    architecture than the kernel's; else nothing."""


@dataclass(frozen=True)
class KernelFacts:
    """A kernel with the files that say what it exports and how it was configured."""

    kernel: Kernel
    symvers: Path
    """Its ``Module.symvers``."""


def facts(image: oci.Image, cell: Cell, cache: Cache, report: Reporter) -> KernelFacts:
    """The kernel of a cell's architecture and flavour in a kmodbuild image; read once per image."""
    key = key_of(image=image.digest, arch=cell.arch, flavor=cell.flavor, recipe=recipe(Path(__file__)))

    def read(folder: Path) -> None:
        with report.step("read kernel") as step, open_rootfs(image, cache.root / "tmp") as rootfs:
            kernel, symvers = read_kernel(rootfs, cell.arch, cell.flavor, image.config["architecture"])
            (folder / "Module.symvers").write_bytes(symvers)
            (folder / "kernel.json").write_text(json.dumps(asdict(kernel), indent=1))
            step.note(f"{kernel.build.release} ({kernel.build.package})")

    folder, _ = cache.make("kernel", key, read)
    return KernelFacts(load(folder / "kernel.json"), folder / "Module.symvers")


def load(path: Path) -> Kernel:
    """Read a kernel back from JSON."""
    return from_json(json.loads(path.read_text()))


def from_json(document: Mapping[str, object]) -> Kernel:
    """Read a kernel out of a JSON document."""
    values = dict(document)
    build = values.pop("build")
    assert isinstance(build, dict)
    return Kernel(build=KernelBuild(**build), **values)  # type: ignore[arg-type]


def read_kernel(rootfs: RootFs, arch: Arch, flavor: Flavor, runs_on: str) -> tuple[Kernel, bytes]:
    """The one kernel of an architecture and flavour, and its ``Module.symvers``; ``runs_on`` is the image's own.

    Raises BuildError where the image has no headers for it, or more than one candidate, or, being of another
    architecture, no compiler for it.
    """
    known = list(_headers(rootfs))
    fitting = [
        (release, folder)
        for release, folder in known
        if _config(rootfs, folder).get(_CONFIG_OF_ARCH[arch]) == "y"
        and ("cloud" in release.split("-")) == (flavor is Flavor.CLOUD)
    ]
    if len(fitting) != 1:
        raise BuildError(
            "kmodbuild image",
            f"must have the headers of exactly one {flavor} kernel for {arch}",
            got=", ".join(f"{release} in /{folder}" for release, folder in fitting)
            or f"none among {', '.join(release for release, _ in known) or 'no headers at all'}",
            hint="a release's kmodbuild image has the headers of its own kernel, one per flavour",
        )
    release, output = fitting[0]
    symvers = rootfs.read(f"{output}/Module.symvers")
    config = rootfs.read(_first(rootfs, f"{output}/.config", f"{output}/include/config/auto.conf"))
    settings = _config(rootfs, output)
    packages = _packages(rootfs)
    build = KernelBuild(
        release=release,
        version=_version(rootfs.read(f"{output}/include/generated/uapi/linux/version.h").decode()),
        package=_owner(rootfs, output, packages),
        digest=hashlib.sha256(hashlib.sha256(symvers).digest() + hashlib.sha256(config).digest()).hexdigest(),
        modversions=settings.get("CONFIG_MODVERSIONS") == "y",
    )
    kernel = Kernel(
        build=build,
        source=f"/{_source(rootfs, release, output)}",
        output=f"/{output}",
        compiler={name: version for name, version in sorted(packages.items()) if _COMPILER.fullmatch(name)},
        drm=settings.get("CONFIG_DRM") in ("y", "m"),
        cross="" if runs_on == arch else _cross(rootfs, arch, runs_on),
    )
    return kernel, symvers


def _cross(rootfs: RootFs, arch: Arch, runs_on: str) -> str:
    """What the names of the tools for another architecture begin with; they come with Debian's triplet."""
    prefix = f"{arch.triplet}-"
    names = {posixpath.basename(node.path) for node in rootfs.below("usr/bin")}
    gcc = re.compile(rf"{re.escape(prefix)}gcc(-[0-9.]+)?")  # the headers say which version
    lacking = [f"{prefix}{tool}" for tool in ("ld", "strip") if f"{prefix}{tool}" not in names]
    if not any(map(gcc.fullmatch, names)):
        lacking.insert(0, f"{prefix}gcc")
    if lacking:
        raise BuildError(
            "kmodbuild image",
            f"is of {runs_on} and cannot compile for {arch}",
            got=f"no {', no '.join(lacking)}",
            hint=f"it needs gcc-{arch.triplet} and what comes with it, or an image of {arch}",
        )
    return prefix


def _headers(rootfs: RootFs) -> Iterator[tuple[str, str]]:
    """Release name and folder of every kernel whose headers are complete enough to build modules."""
    places = {posixpath.dirname(node.path) for node in rootfs.below("usr/src") if node.path.endswith("/Module.symvers")}
    for modules in ("usr/lib/modules", "lib/modules"):
        for node in rootfs.below(modules):
            if posixpath.basename(node.path) == "build" and (target := rootfs.resolve(node.path)):
                places.add(target.path)
    for folder in sorted(places):
        if rootfs.resolve(f"{folder}/Module.symvers") and rootfs.resolve(f"{folder}/include/generated/utsrelease.h"):
            text = rootfs.read(f"{folder}/include/generated/utsrelease.h").decode()
            if found := re.search(r'UTS_RELEASE\s+"([^"]+)"', text):
                yield found[1], folder


def _config(rootfs: RootFs, folder: str) -> dict[str, str]:
    path = _first(rootfs, f"{folder}/include/config/auto.conf", f"{folder}/.config")
    text = rootfs.read(path).decode() if rootfs.resolve(path) else ""
    return dict(line.split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_") and "=" in line)


def _first(rootfs: RootFs, *paths: str) -> str:
    return next((path for path in paths if rootfs.resolve(path)), paths[-1])


def _version(header: str) -> str:
    """Upstream version out of ``version.h``; LINUX_VERSION_CODE would cap the last part at 255."""
    parts = dict(re.findall(r"#define LINUX_VERSION_(\w+) (\d+)", header))
    try:
        return f"{parts['MAJOR']}.{parts['PATCHLEVEL']}.{parts['SUBLEVEL']}"
    except KeyError as error:
        raise BuildError("version.h", "does not say the kernel's version", got=header.strip() or "nothing") from error


def _source(rootfs: RootFs, release: str, output: str) -> str:
    """Folder of the shared headers: what ``source`` beside ``build`` points at, or the flavour's own folder."""
    for modules in ("usr/lib/modules", "lib/modules"):
        if (folder := rootfs.resolve(f"{modules}/{release}/source")) and folder.is_dir:
            return folder.path
    makefile = rootfs.read(f"{output}/Makefile").decode()
    if found := re.search(r"^include\s+/?(\S+)/Makefile$", makefile, re.MULTILINE):
        return posixpath.normpath(found[1])
    return output


def _packages(rootfs: RootFs) -> dict[str, str]:
    """Version of every package whose files are there: headers of another architecture can be no more than unpacked."""
    status = rootfs.read("var/lib/dpkg/status").decode()
    return {
        paragraph["Package"]: paragraph["Version"]
        for paragraph in Deb822.iter_paragraphs(status.splitlines(), use_apt_pkg=False)
        if "Package" in paragraph
        and paragraph.get("Status", "install ok installed").endswith((" installed", " unpacked"))
    }


def _owner(rootfs: RootFs, output: str, packages: Mapping[str, str]) -> str:
    """Version of the package that brought the headers in a folder."""
    wanted = f"/{output}/Module.symvers"
    # A package made before /usr was merged lists /lib/modules/…, which is found below /usr/lib.
    spelled = {wanted, wanted.removeprefix("/usr")}
    for node in rootfs.below("var/lib/dpkg/info"):
        if node.path.endswith(".list") and not spelled.isdisjoint(node.read().decode().splitlines()):
            name = posixpath.basename(node.path).removesuffix(".list").partition(":")[0]
            if name in packages:
                return packages[name]
    raise BuildError(
        f"kmodbuild image: {wanted}",
        "belongs to no package, so nobody can say which kernel build it is of",
        hint="the image must keep dpkg's database",
    )
