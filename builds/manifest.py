"""The ``.manifest`` of a driver tree, and which of its files make up the user space of a data-centre node.

Every entry has a type. The table below says, for each type the vendor's installer knows, which fields its lines
have, and whether its files are kept, and where, or dropped, and why; a type that is not in the table is an error,
because to leave it out in silence is how libraries got lost. Two short lists of names overrule the type.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import basename, dirname, normpath
from typing import Any, Literal

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from .errors import BuildError
from .model import Arch


@dataclass(frozen=True)
class ManifestEntry:
    """One line of a manifest: a file of the package, or a link to be made beside one."""

    path: str
    """In the driver tree; of a link, just its name."""
    mode: int
    type: str
    arch: Literal["NATIVE", "COMPAT32"] | None = None
    location: str | None = None
    """The PATH field: a folder below the one that the type stands for, or an absolute one."""
    inherit_depth: int | None = None
    """How many leading folders of ``path`` the installed file does without."""
    target: str | None = None
    module: str | None = None
    """The vendor's name of the driver component, such as ``gpgpu``."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of one driver package."""

    description: str
    version: str
    module_names: tuple[str, ...]
    entries: tuple[ManifestEntry, ...]


@dataclass(frozen=True)
class Placed:
    """A file or link of the user space and its place below the driver root."""

    dest: str
    source: str | None
    """Path in the driver tree; None for a link."""
    target: str | None
    """Where a link points, relative to its own folder; None for a file."""
    mode: int
    entry: ManifestEntry | None
    """The line it comes from; None for what our own rules add."""
    component: str = ""
    """The component whose archive has it; empty for the driver package."""


@dataclass(frozen=True)
class _Type:
    fields: str
    """Fields after the type, in order: A(rch), P(ath), I(nherited path), T(arget); ``a``: may be missing."""
    folder: str | None = None
    """Where its files go; None: dropped."""
    reason: str = ""


_BIN, _LIB = "usr/bin", "usr/lib/{triplet}"
_GL = "OpenGL, EGL, Vulkan, OptiX: the toolkit counts them as graphics; this image serves compute"
_X11 = "a part of the X server"
_DESKTOP = "a desktop's settings and menus"
_INSTALLER = "serves the vendor's installer, which is not used"
_KERNEL = "kernel modules are compiled beforehand and shipped apart"
_SYSTEMD = "systemd units of a host; the container starts what it needs itself"
_VGPU = "vGPU licensing, which needs the vendor's other packages"
_DOCS = "documentation"

_TYPES: dict[str, _Type] = {
    "CUDA_LIB": _Type("AP", _LIB),
    "CUDA_SYMLINK": _Type("APT", _LIB),
    "CUDA_ICD": _Type("", "etc/OpenCL/vendors"),
    "OPENCL_LIB": _Type("AP", _LIB),
    "OPENCL_LIB_SYMLINK": _Type("APT", _LIB),
    "OPENCL_WRAPPER_LIB": _Type("AP", _LIB),
    "OPENCL_WRAPPER_SYMLINK": _Type("APT", _LIB),
    "UTILITY_LIB": _Type("A", _LIB),
    "UTILITY_LIB_SYMLINK": _Type("AT", _LIB),
    "UTILITY_BINARY": _Type("", _BIN),
    "UTILITY_BIN_SYMLINK": _Type("T", _BIN),
    "NVCUVID_LIB": _Type("A", _LIB),
    "NVCUVID_LIB_SYMLINK": _Type("AT", _LIB),
    "ENCODEAPI_LIB": _Type("A", _LIB),
    "ENCODEAPI_LIB_SYMLINK": _Type("AT", _LIB),
    "VDPAU_LIB": _Type("AP", _LIB),
    "VDPAU_SYMLINK": _Type("APT", _LIB),
    "FIRMWARE": _Type("I", "lib/firmware/nvidia/{version}"),
    "NVIDIA_MODPROBE": _Type("P", ""),
    "EXPLICIT_PATH": _Type("P", ""),
    "SANDBOXUTILS_FILELIST_JSON": _Type("P", "usr/share/nvidia/files.d"),
    "OPENGL_LIB": _Type("A", reason=_GL),
    "OPENGL_SYMLINK": _Type("AT", reason=_GL),
    "OPENGL_DATA": _Type("P", reason=_GL),
    "TLS_LIB": _Type("AP", reason=_GL),
    "GLVND_LIB": _Type("A", reason=_GL),
    "GLVND_SYMLINK": _Type("AT", reason=_GL),
    "GLVND_EGL_ICD_JSON": _Type("", reason=_GL),
    "GLX_CLIENT_LIB": _Type("A", reason=_GL),
    "GLX_CLIENT_SYMLINK": _Type("AT", reason=_GL),
    "EGL_CLIENT_LIB": _Type("A", reason=_GL),
    "EGL_CLIENT_SYMLINK": _Type("AT", reason=_GL),
    "EGL_EXTERNAL_PLATFORM_JSON": _Type("", reason=_GL),
    "GBM_BACKEND_LIB": _Type("A", reason=_GL),
    "GBM_BACKEND_LIB_SYMLINK": _Type("AT", reason=_GL),
    "VULKAN_ICD_JSON": _Type("P", reason=_GL),
    "VULKANSC_ICD_JSON": _Type("P", reason=_GL),
    "APPLICATION_PROFILE": _Type("P", reason=_GL),
    "LIBGL_LA": _Type("A", reason=_GL),
    "NVIFR_LIB": _Type("A", reason=_GL),
    "NVIFR_LIB_SYMLINK": _Type("AT", reason=_GL),
    "WINE_LIB": _Type("A", reason="Windows games"),
    "XMODULE_SHARED_LIB": _Type("P", reason=_X11),
    "GLX_MODULE_SHARED_LIB": _Type("P", reason=_X11),
    "GLX_MODULE_SYMLINK": _Type("PT", reason=_X11),
    "XORG_OUTPUTCLASS_CONFIG": _Type("", reason=_X11),
    "DOT_DESKTOP": _Type("P", reason=_DESKTOP),
    "ICON": _Type("P", reason=_DESKTOP),
    "DOCUMENTATION": _Type("P", reason=_DOCS),
    "MANPAGE": _Type("P", reason=_DOCS),
    "NVIDIA_MODPROBE_MANPAGE": _Type("P", reason=_DOCS),
    "INSTALLER_BINARY": _Type("", reason=_INSTALLER),
    "INTERNAL_UTILITY_BINARY": _Type("a", reason=_INSTALLER),
    "INTERNAL_UTILITY_LIB": _Type("a", reason=_INSTALLER),
    "INTERNAL_UTILITY_DATA": _Type("a", reason=_INSTALLER),
    "KERNEL_MODULE": _Type("", reason=_KERNEL),
    "KERNEL_MODULE_SRC": _Type("I", reason=_KERNEL),
    "DKMS_CONF": _Type("I", reason=_KERNEL),
    "MODULE_SIGNING_KEY": _Type("", reason=_KERNEL),
    "SYSTEMD_UNIT": _Type("", reason=_SYSTEMD),
    "SYSTEMD_UNIT_SYMLINK": _Type("PT", reason=_SYSTEMD),
    "SYSTEMD_SLEEP_SCRIPT": _Type("", reason=_SYSTEMD),
    "VGX_LIB": _Type("", reason=_VGPU),
    "VGX_LIB_SYMLINK": _Type("T", reason=_VGPU),
    "GRID_LIB": _Type("P", reason=_VGPU),
    "GRID_LIB_SYMLINK": _Type("PT", reason=_VGPU),
    "FLEXERA_LIB": _Type("P", reason=_VGPU),
    "FLEXERA_LIB_SYMLINK": _Type("PT", reason=_VGPU),
}

_KEPT_NAMES = {
    # libcuda and the OpenCL library load this compiler, though the vendor files it under OpenGL.
    "libnvidia-gpucomp.so*": _LIB,
}
"""Names kept although their type is dropped, and where they go."""

_DROPPED_NAMES = {
    "nvidia-settings*": _DESKTOP,
    "nvidia-xconfig*": _DESKTOP,
    "libnvidia-gtk*": _DESKTOP,
    "libnvidia-wayland-client*": _DESKTOP,
    "libnvidia-egl-*": _GL,
    "libnvidia-vksc-core*": _GL,
    "libnvidia-fbc.so*": "captures an X server's screen",
    "nvidia-ngx-updater": "updates games' image scaling",
    "nvidia-pcc": "compiles Vulkan SC pipelines",
    "nvidia-powerd": "shares power between the processors of a notebook",
    "nvidia-dbus.conf": "belongs to nvidia-powerd",
    "dlsnetparams.csv": "belongs to nvidia-powerd",
    "nvidia-sleep.sh": "suspends a desktop",
    "nvidia-installer": _INSTALLER,
    "nvidia-uninstall": _INSTALLER,
}
"""Names dropped although their type is kept, and why."""

_LOCATION_IS_FIXED = ("SANDBOXUTILS_FILELIST_JSON",)
"""Types with a PATH field that the vendor's installer does not use."""

_LICENCES = {
    "LICENSE": "usr/share/nvidia/LICENSE",
    "supported-gpus/LICENSE": "usr/share/nvidia/supported-gpus/LICENSE",
    "supported-gpus/supported-gpus.json": "usr/share/nvidia/supported-gpus/supported-gpus.json",
}
"""What goes into every image, whatever type the manifest gives it, and even if it is silent about it."""

_ESSENTIAL = ("nvidia-smi", "nvidia-modprobe", "libcuda.so.{version}", "libnvidia-ml.so.{version}")
"""Without these no node works: a manifest that lacks one was misread, or is not a driver's."""

_FIELDS = {
    "A": ("NATIVE or COMPAT32", r"NATIVE|COMPAT32"),
    "I": ("INHERIT_PATH_DEPTH", r"INHERIT_PATH_DEPTH:\d+"),
    "P": ("path", r"(?!INHERIT_PATH_DEPTH:|NATIVE$|COMPAT32$).+"),
    "T": ("link target", r"(?!INHERIT_PATH_DEPTH:|NATIVE$|COMPAT32$).+"),
}

_UNKNOWN = "unknown type"

_LONGEST_NAME = 255
"""Bytes of a file's name, at most: what Linux takes (limits.h, NAME_MAX)."""

_FIRST_ENTRY = 9
"""Number of the first line with an entry."""


def parse(text: str) -> Manifest:
    """Read a manifest. Raises BuildError that names every unknown type and every malformed line, with line numbers."""
    manifest, problems = read(text)
    if problems:
        unknown = any(problem.startswith(_UNKNOWN) for problem in problems)
        raise BuildError(
            ".manifest",
            "has entries that cannot be placed",
            got="; ".join(problems),
            hint="say in builds/manifest.py what an unknown type has and where it goes" if unknown else None,
        )
    return manifest


def read(text: str) -> tuple[Manifest, tuple[str, ...]]:
    """Read a manifest as far as it is understood, and say what is not: unknown types, malformed lines.

    Line 1 describes the package, 2 is its version, 4 names the kernel modules; entries run from line 9 to the
    first empty one. Raises BuildError for what is no manifest at all.
    """
    lines = text.rstrip("\r\n").split("\n")
    if len(lines) < _FIRST_ENTRY or not re.fullmatch(r"\d+(\.\d+)+", lines[1].strip()):
        raise BuildError(
            ".manifest",
            "is not a driver package's",
            got=f"{len(lines)} lines, version {lines[1].strip()!r}" if len(lines) > 1 else f"{len(lines)} lines",
            hint="unpack the driver package again",
        )
    entries: list[ManifestEntry] = []
    unknown: defaultdict[str, list[int]] = defaultdict(list)
    problems: list[str] = []
    for number, line in enumerate(lines[_FIRST_ENTRY - 1 :], _FIRST_ENTRY):
        if not line.strip():
            break
        words = line.split()
        if len(words) >= 3 and words[2] not in _TYPES:
            unknown[words[2]].append(number)
            continue
        try:
            entries.append(_entry(words))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    named = [f"{_UNKNOWN} {kind} (line {', '.join(map(str, at))})" for kind, at in sorted(unknown.items())]
    manifest = Manifest(lines[0].strip(), lines[1].strip(), tuple(lines[3].split()), tuple(entries))
    return manifest, (*named, *problems)


def select(manifest: Manifest, arch: Arch) -> tuple[Placed, ...]:
    """The user space of a node for one architecture, sorted by destination.

    That is CUDA, NVML, NVENC and NVDEC, OpenCL, OptiX, MPS, the tools, the firmware and the licences. Modes are
    0755 for what the manifest calls executable, libraries included, and 0644 for the rest: nobody but root runs
    nvidia-modprobe here, so no file is setuid. Raises BuildError where two entries want one place.
    """
    placed: dict[str, Placed] = {dest: Placed(dest, source, None, 0o644, None) for source, dest in _LICENCES.items()}
    for entry in manifest.entries:
        found = _place(entry, manifest.version, arch)
        if isinstance(found, str):
            continue
        other = placed.setdefault(found.dest, found)
        if other.entry is None:
            placed[found.dest] = found
        elif (other.source, other.target) != (found.source, found.target):
            got = " and ".join(p.source or f"a link to {p.target}" for p in (other, found))
            raise BuildError(".manifest", f"has two entries for {found.dest}", got=got)
    return tuple(placed[dest] for dest in sorted(placed))


def dropped(manifest: Manifest, arch: Arch) -> tuple[tuple[ManifestEntry, str], ...]:
    """The entries that :func:`select` leaves out, in the manifest's order, each with the reason."""
    verdicts = ((entry, _place(entry, manifest.version, arch)) for entry in manifest.entries)
    return tuple((entry, verdict) for entry, verdict in verdicts if isinstance(verdict, str))


def missing(manifest: Manifest, selected: tuple[Placed, ...], tree: Path) -> tuple[str, ...]:
    """What the user space lacks, one phrase each; nothing if it is whole.

    Selected files that the driver tree does not hold, or holds empty; links to nothing; essential files that the
    manifest does not name.
    """
    places = {one.dest for one in selected}
    names = {basename(one.dest) for one in selected}
    lacking = []
    for one in selected:
        if one.target is not None and normpath(f"{dirname(one.dest)}/{one.target}") not in places:
            lacking.append(f"{one.dest}: its target {one.target} is not kept")
        if one.source is not None:
            file = tree / one.source
            if not file.is_file():
                lacking.append(f"{one.source}: not in the package")
            elif not file.stat().st_size:
                lacking.append(f"{one.source}: empty")
    essential = (name.format(version=manifest.version) for name in _ESSENTIAL)
    return (*lacking, *(f"{name}: not in the manifest" for name in essential if name not in names))


def soname_links(selected: tuple[Placed, ...], tree: Path) -> tuple[Placed, ...]:
    """Links for the libraries whose SONAME is neither their name nor a place already taken, sorted.

    The vendor's installer leaves them to ldconfig; the driver root is also read where nobody runs that. Raises
    BuildError for a library that is not an ELF file, and where two libraries want one link.
    """
    taken = {one.dest for one in selected}
    links: dict[str, Placed] = {}
    for one in selected:
        if one.source is None or ".so" not in basename(one.dest):
            continue
        soname = _soname(tree / one.source)
        if soname is None:
            continue
        dest = f"{dirname(one.dest)}/{soname}"
        if dest in taken:
            continue
        if dest in links:
            got = f"{links[dest].target} and {basename(one.dest)}"
            raise BuildError(soname, "is the SONAME of two libraries", got=got)
        links[dest] = Placed(dest, None, basename(one.dest), 0o777, None)
    return tuple(links[dest] for dest in sorted(links))


def _entry(words: list[str]) -> ManifestEntry:
    """Read one line, whose type is known. Raises ValueError that says what is wrong with it."""
    if len(words) < 3:
        raise ValueError(f"has no type: {' '.join(words)}")
    path, mode, kind, *rest = words
    if not re.fullmatch(r"[0-7]{3,5}", mode):
        raise ValueError(f"{mode} is not an octal mode")
    module = None
    # The vendor's own reader ignores tags behind the fields.
    while rest and re.fullmatch(r"(?!INHERIT_PATH_DEPTH)[A-Z_]+:\S*", rest[-1]):
        name, _, value = rest.pop().partition(":")
        module = value if name == "MODULE" else module
    fields: dict[str, str] = {}
    for field in _TYPES[kind].fields:
        meaning, pattern = _FIELDS[field.upper()]
        if rest and re.fullmatch(pattern, rest[0]):
            fields[field.upper()] = rest.pop(0)
        elif field.isupper():
            raise ValueError(f"{path}: a {kind} has a {meaning} here, got {rest[0] if rest else 'nothing'}")
    if rest:
        raise ValueError(f"{path}: a {kind} has no such field: {' '.join(rest)}")
    path, arch = normpath(path), fields.get("A")
    if path == ".":
        raise ValueError(f"{words[0]} is no file's name")
    if any(len(part.encode()) > _LONGEST_NAME for name in (path, *fields.values()) for part in name.split("/")):
        raise ValueError(f"{path[:40]}…: has a name of more than {_LONGEST_NAME} bytes")
    depth = int(fields["I"].partition(":")[2]) if "I" in fields else None
    if depth is not None and depth > path.count("/"):
        raise ValueError(f"{path}: has no {depth} folders to do without")
    return ManifestEntry(
        path=path,
        mode=int(mode, 8),
        type=kind,
        arch="NATIVE" if arch == "NATIVE" else "COMPAT32" if arch else None,
        location=fields.get("P"),
        inherit_depth=depth,
        target=fields.get("T"),
        module=module,
    )


def _place(entry: ManifestEntry, version: str, arch: Arch) -> Placed | str:
    """Where an entry goes, or why it goes nowhere. Raises BuildError where it would leave the driver root."""
    if entry.arch == "COMPAT32":
        return "32-bit"
    dest = _LICENCES.get(entry.path)
    if dest is None:
        name, rule = basename(entry.path), _TYPES[entry.type]
        for pattern, reason in _DROPPED_NAMES.items():
            if fnmatchcase(name, pattern):
                return reason
        folder = rule.folder
        if folder is None:
            folder = next((to for pattern, to in _KEPT_NAMES.items() if fnmatchcase(name, pattern)), None)
        if folder is None:
            return rule.reason
        if entry.inherit_depth is not None:
            name = "/".join(entry.path.split("/")[entry.inherit_depth :])
        location = "" if entry.type in _LOCATION_IS_FIXED else entry.location or ""
        folder = folder.format(triplet=arch.triplet, version=version)
        dest = f"{folder}/{location}/{name}"
    for path, absolute in ((entry.path, False), (dest, True), (entry.target or "", False)):
        if ".." in path.split("/") or (path.startswith("/") and not absolute):
            raise BuildError(".manifest", f"has an entry that leads out of its folder: {entry.path}", got=path)
    dest = normpath(dest).lstrip("/")
    if entry.target is not None:
        return Placed(dest, None, entry.target, 0o777, entry)
    return Placed(dest, entry.path, None, 0o755 if entry.mode & 0o111 else 0o644, entry)


def _soname(library: Path) -> str | None:
    try:
        with library.open("rb") as stream:
            segments = [one for one in ELFFile(stream).iter_segments() if isinstance(one, DynamicSegment)]
            tags: list[Any] = [tag for one in segments for tag in one.iter_tags("DT_SONAME")]
            name = str(tags[0].soname) if tags else None
    except (ELFError, OSError) as error:
        hint = "unpack the driver package again"
        raise BuildError(library.name, "is not a library that can be read", got=str(error), hint=hint) from error
    if name and "/" in name:
        raise BuildError(library.name, "has a SONAME with a folder in it", got=name)
    return name
