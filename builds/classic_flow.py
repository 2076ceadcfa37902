"""The user space of the classic flow, to compare ours with: the vendor's installer, then globs over what it laid down.

The original Makefile project runs ``nvidia-installer --no-opengl-files --no-install-compat32-libs --no-systemd
--no-kernel-module-source --utility-prefix=OUT --utility-libdir=lib`` in a container, copies
``/usr/lib/<triplet>/*nvidia*`` and ``*cuda*`` to ``OUT/lib`` (``cp`` follows links and leaves out folders), removes
``OUT/bin/*install*`` and ``OUT/share``, and archives ``OUT``. Where the installer puts what is read off its own
sources (NVIDIA/nvidia-installer, GPL): measured on packages of 470 and 550, that was what it laid down.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from posixpath import basename, dirname, normpath

from .manifest import Manifest, ManifestEntry, Placed
from .model import Arch

_GLOBS = ("*nvidia*", "*cuda*")

_OPENGL = (
    *("OPENGL_LIB", "OPENGL_SYMLINK", "OPENGL_DATA", "TLS_LIB", "GLVND_LIB", "GLVND_SYMLINK", "GLVND_EGL_ICD_JSON"),
    *("GLX_CLIENT_LIB", "GLX_CLIENT_SYMLINK", "GLX_MODULE_SHARED_LIB", "GLX_MODULE_SYMLINK"),
    *("EGL_CLIENT_LIB", "EGL_CLIENT_SYMLINK", "EGL_EXTERNAL_PLATFORM_JSON"),
)
"""Types that ``--no-opengl-files`` leaves out."""

_UTILITY_LIBS = ("UTILITY_LIB", "UTILITY_LIB_SYMLINK")
_TOOLS = ("UTILITY_BINARY", "UTILITY_BIN_SYMLINK", "INSTALLER_BINARY")
_SYSTEMD = ("SYSTEMD_UNIT", "SYSTEMD_UNIT_SYMLINK", "SYSTEMD_SLEEP_SCRIPT")
_SOURCES = ("KERNEL_MODULE_SRC", "KERNEL_MODULE", "DKMS_CONF", "MODULE_SIGNING_KEY")
_ABSOLUTE = ("EXPLICIT_PATH", "NVIDIA_MODPROBE", "OPENGL_DATA")
"""Types whose PATH field is the whole folder."""

_FOLDERS = {
    "CUDA_ICD": "/etc/OpenCL/vendors",
    "FIRMWARE": "/lib/firmware/nvidia/{version}",
    "DOCUMENTATION": "/usr/share/doc",
    "MANPAGE": "/usr/share/man",
    "NVIDIA_MODPROBE_MANPAGE": "/usr/share/man",
    "APPLICATION_PROFILE": "/usr/share/nvidia",
    "SANDBOXUTILS_FILELIST_JSON": "/usr/share/nvidia/files.d",
    "VULKAN_ICD_JSON": "/etc/vulkan",
    "VULKANSC_ICD_JSON": "/etc/vulkansc",
    "GLVND_EGL_ICD_JSON": "/usr/share/glvnd/egl_vendor.d",
    "EGL_EXTERNAL_PLATFORM_JSON": "/usr/share/egl/egl_external_platform.d",
    "XMODULE_SHARED_LIB": "/usr/lib/xorg/modules",
    "GLX_MODULE_SHARED_LIB": "/usr/lib/xorg/modules",
    "GLX_MODULE_SYMLINK": "/usr/lib/xorg/modules",
    "XORG_OUTPUTCLASS_CONFIG": "/usr/share/X11/xorg.conf.d",
    "SYSTEMD_UNIT": "/usr/lib/systemd/system",
    "SYSTEMD_UNIT_SYMLINK": "/etc/systemd/system",
    "SYSTEMD_SLEEP_SCRIPT": "/usr/lib/systemd/system-sleep",
    "DOT_DESKTOP": "/usr/share/applications",
    "ICON": "/usr/share/icons",
    "GBM_BACKEND_LIB": "/usr/lib/{triplet}/gbm",
    "GBM_BACKEND_LIB_SYMLINK": "/usr/lib/{triplet}/gbm",
    "INTERNAL_UTILITY_BINARY": "/usr/lib/nvidia",
    "INTERNAL_UTILITY_LIB": "/usr/lib/nvidia",
    "INTERNAL_UTILITY_DATA": "/usr/lib/nvidia",
}
"""Where the installer puts the files of a type, other than libraries and tools."""

_WITHOUT_PATH = ("APPLICATION_PROFILE", "SANDBOXUTILS_FILELIST_JSON", "DOT_DESKTOP")
"""Types with a PATH field that the installer does not use."""


class Fate(enum.Enum):
    """What becomes of an entry in the classic flow."""

    KEPT = "kept"
    COPY = "a copy, not a link"
    LOST = "not in its archive"


@dataclass(frozen=True)
class Outcome:
    """What becomes of an entry, and why."""

    fate: Fate
    installed: str
    """Where the installer puts it by default; a tool and a utility's library under its ``--utility-prefix``."""
    why: str = ""


def outcome(entry: ManifestEntry, version: str, arch: Arch) -> Outcome:
    """What the classic flow makes of an entry of a manifest."""
    place = _installed(entry, version, arch)
    name, folder = basename(place), dirname(place)
    if entry.arch == "COMPAT32":
        return Outcome(Fate.LOST, place, "`--no-install-compat32-libs`")
    if entry.type in _OPENGL:
        return Outcome(Fate.LOST, place, "`--no-opengl-files`")
    if entry.type in _SYSTEMD:
        return Outcome(Fate.LOST, place, "`--no-systemd`")
    if entry.type in _SOURCES:
        return Outcome(Fate.LOST, place, "`--no-kernel-module-source`")
    if entry.type in _TOOLS:
        removed = fnmatchcase(name, "*install*")
        return Outcome(Fate.LOST, place, "`rm bin/*install*`") if removed else Outcome(Fate.KEPT, place)
    if entry.type in _UTILITY_LIBS:
        return Outcome(Fate.KEPT, place)
    libraries = f"/usr/lib/{arch.triplet}"
    if folder != libraries:
        below = folder.startswith(f"{libraries}/")
        return Outcome(Fate.LOST, place, "`cp` leaves out folders" if below else f"nothing is taken from `{folder}`")
    if not any(fnmatchcase(name, pattern) for pattern in _GLOBS):
        return Outcome(Fate.LOST, place, "no glob matches its name")
    return Outcome(Fate.COPY if entry.target is not None else Fate.KEPT, place, "`cp` follows links")


def differences(
    manifest: Manifest, arch: Arch, selected: Sequence[Placed], dropped: Iterable[tuple[ManifestEntry, str]]
) -> str:
    """The difference between our user space and the classic flow's, file by file, as Markdown."""
    fates = {entry: outcome(entry, manifest.version, arch) for entry in manifest.entries}
    ours = {one.dest: _fate_of(one, selected, fates) for one in selected}
    out = [(entry, reason) for entry, reason in dropped if entry.arch != "COMPAT32" and entry.type not in _SOURCES]
    lost = [(place, why) for place, (fate, why) in ours.items() if fate is Fate.LOST]
    copies = [place for place, (fate, _) in ours.items() if fate is Fate.COPY]
    only_theirs = [(entry, reason) for entry, reason in out if fates[entry].fate is not Fate.LOST]
    neither = [(entry, reason) for entry, reason in out if fates[entry].fate is Fate.LOST]
    papers = Counter(entry.type for entry, _ in neither if _is_paper(entry))
    desktop = [(entry, reason) for entry, reason in neither if not _is_paper(entry)]
    kept = sum(fate is Fate.KEPT for fate, _ in ours.values())
    return "\n".join(
        (
            _INTRODUCTION.format(version=manifest.version, arch=arch, triplet=arch.triplet),
            f"{len(ours)} files and links are in the image. {kept} of them are in the classic archive as well, "
            f"{len(copies)} as copies instead of links,",
            f"{len(lost)} not at all. {len(only_theirs)} are in the classic archive alone.",
            "",
            "## In the image, lost by the classic flow",
            "",
            *_table(("in the driver root", "why the classic flow has it not"), lost),
            "## Links in the image, copies in the classic archive",
            "",
            "`cp` follows links: each of these is a second or third copy of its library there, and no longer says",
            "which version it belongs to.",
            "",
            *(f"- `{place}`" for place in copies),
            "",
            "## In the classic archive, not in the image",
            "",
            *_table(
                ("in the archive", "why the image has it not"),
                [(fates[entry].installed.lstrip("/"), reason) for entry, reason in only_theirs],
            ),
            "## Laid down by the vendor's installer by default, in neither",
            "",
            *_table(
                ("installed as", "why the classic flow has it not", "why the image has it not"),
                [(fates[entry].installed, fates[entry].why, reason) for entry, reason in desktop],
            ),
            "Besides, "
            + ", ".join(f"{count} of type {kind}" for kind, count in sorted(papers.items()))
            + ": nothing is taken from `/usr/share`, and",
            "the image serves machines. The licences are the exception: the image has them.",
            "",
        )
    )


_INTRODUCTION = """\
# The user space of an image, and that of the classic flow

<!-- Generated: python -m builds probe-package {version} --arch {arch} --differences -->

What `builds/manifest.py` selects of the {arch} driver package {version}, against what the original Makefile project
takes of it. That project's *classic flow* has two steps:

1. The vendor's installer, run in the build container with `--no-opengl-files --no-install-compat32-libs --no-systemd
   --no-kernel-module-source --utility-prefix=OUT --utility-libdir=lib`: tools go to `OUT/bin`, libraries of type
   `UTILITY_LIB` to `OUT/lib`, everything else into the container's own folders. Without the first option it lays down
   everything of OpenGL and X as well.
2. Globs: `cp /usr/lib/{triplet}/*nvidia* /usr/lib/{triplet}/*cuda* OUT/lib`; then `OUT/bin/*install*`
   and `OUT/share` are removed, and `OUT` is archived. Both steps end with 0 although a library is missing.

What was brought along in other ways later, after users had missed it (firmware, licences), is not counted here.

That our rules and the first step agree was measured: the installer, built from its GPL source and run on packages put
together from Debian's, laid down 51 of the 51 files that the manifest's types promise for 470.256.02, and 49 of the 50
for 550.163.01 (the fiftieth is a SONAME link). Those manifests were partly reconstructed, so agreement on newer types
of entries is not proven by it. The loss in the second step was seen there as well: libnvcuvid, libOpenCL and the vdpau
folder. This page works out both steps for every entry of the package's manifest, by `builds/classic_flow.py`; a test
generates it anew and compares. The package is the lab's: the vendor's has more for desktops. Places differ throughout
(`lib/` there, `usr/lib/{triplet}/` here) and are not listed as differences.
"""


def _fate_of(one: Placed, selected: Sequence[Placed], fates: dict[ManifestEntry, Outcome]) -> tuple[Fate, str]:
    """What becomes of a part of our user space there. One that has no entry is a licence, or a link of ours."""
    if one.entry:
        return fates[one.entry].fate, fates[one.entry].why
    if one.target is None:
        return Fate.LOST, "nothing is taken from `/usr/share/doc`"
    library = next(other for other in selected if other.dest == normpath(f"{dirname(one.dest)}/{one.target}"))
    fate, why = _fate_of(library, selected, fates)
    if library.entry and library.entry.type in _UTILITY_LIBS:
        return Fate.LOST, "no `ldconfig` runs over `OUT/lib`"
    if fate is Fate.KEPT and any(fnmatchcase(basename(one.dest), pattern) for pattern in _GLOBS):
        return Fate.COPY, "`cp` follows links"
    return Fate.LOST, why or "no glob matches its name"


def _installed(entry: ManifestEntry, version: str, arch: Arch) -> str:
    names = {"version": version, "triplet": arch.triplet}
    name = basename(entry.path)
    if entry.inherit_depth is not None:
        name = "/".join(entry.path.split("/")[entry.inherit_depth :])
    location = "" if entry.type in _WITHOUT_PATH else entry.location or ""
    if entry.arch == "COMPAT32":
        return normpath(f"/usr/lib/i386-linux-gnu/{location}/{name}")
    if entry.type in _TOOLS:
        return f"bin/{name}"
    if entry.type in _UTILITY_LIBS:
        return f"lib/{name}"
    if entry.type in _ABSOLUTE:
        return normpath(f"/{location}/{name}").replace("//", "/")
    folder = _FOLDERS.get(entry.type, "/usr/lib/{triplet}").format(**names)
    return normpath(f"{folder}/{location}/{name}")


def _is_paper(entry: ManifestEntry) -> bool:
    return entry.type in ("DOCUMENTATION", "MANPAGE", "NVIDIA_MODPROBE_MANPAGE")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *((f"`{first}`", *rest) for first, *rest in sorted(rows))]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
