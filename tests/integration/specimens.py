"""Images that are wrong on purpose: small mutations of a sound one, each with the check that must refuse it.

A mutation works on a :class:`Draft` of the sound image and is a line or two; a new one is an entry in SPECIMENS.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

import zstandard

from builds import oci, paths
from builds.model import MODULES, ModuleType
from builds.oci import Layer

from .draft import (
    ROOT,
    Draft,
    crashing,
    flip,
    flip_crc,
    flip_in,
    forging,
    header,
    into,
    layout_alone,
    other_machine,
    rename_section,
    swap_info,
    swap_text,
    without_exit,
)


@dataclass(frozen=True)
class Specimen:
    """A mutation and the check that must refuse it."""

    name: str
    check: str
    """Id of the check."""
    thing: str
    """Its object; ``*`` for any."""
    spoil: Callable[[Draft], object]


def _swap_types(draft: Draft, *names: str) -> None:
    for name in names:
        kinds = [draft.module(name, kind) for kind in ModuleType]
        contents = [draft.sound.read(path) for path in kinds]
        for path, data in zip(kinds, reversed(contents), strict=True):
            draft.edit(path, lambda _old, data=data: data)  # type: ignore[misc]


def _library(draft: Draft, name: str) -> str:
    return f"{draft.libraries}/{name}.so.{draft.plan.cell.driver}"


def _firmware(draft: Draft) -> list[str]:
    return [path for path in draft.sound.below(f"{ROOT}/lib/firmware") if path.endswith(".bin")]


def _rename_firmware(draft: Draft) -> None:
    for path in _firmware(draft):
        draft.set(path, name=path.replace(draft.plan.cell.driver, "550.1.1"))


def _retag(draft: Draft, old: str, new: str) -> None:
    """Change the tag that the operator computes for the branch."""
    at = next(number for number, name in enumerate(draft.names) if name.rpartition(":")[2].startswith("550-"))
    assert old in draft.names[at]
    draft.names[at] = draft.names[at].replace(old, new)


def _part(name: str) -> str:
    """Path of a part of the installer."""
    return f"{paths.INSTALLER}/{name}.sh"


_FACTS = f"{paths.INSTALLER}/release.env"
_DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_ARM = {"os": "linux", "architecture": "arm64"}


def _link_module(draft: Draft, name: str) -> None:
    draft.become_link(draft.module(name), f"../proprietary/{name}.ko")


def _swap_last(layers: list[Layer]) -> None:
    layers[-1], layers[-2] = layers[-2], layers[-1]


_HIDDEN = header("etc/evil", b"x", mode=b"\x81\0\0\0\0\0\x01\xed") + header("etc/ld.so.preload", b"/etc/evil\n")
_SKIPPED = b"\x50\x2a\x4d\x18" + (13).to_bytes(4, "little") + b"token=hunter2"
_MARK = b"\xef\xbb\xbf"
_WINDOWS = {"os": "windows", "architecture": "amd64"}


def _archive(draft: Draft, extra: bytes) -> None:
    draft.archive = into(extra)


def _unfinished(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


def _without_base(draft: Draft) -> None:
    draft.set(next(path for path, layer in draft.sound.layer_of.items() if layer == 0 and "/" in path), mtime=1)


SPECIMENS = (
    # modules
    Specimen("crc flipped", "modules.crcs", "open/nvidia.ko", lambda d: d.edit(d.module("nvidia"), flip_crc("vfree"))),
    Specimen(
        "crc of a sibling's symbol flipped",
        "modules.crcs",
        "proprietary/nvidia-modeset.ko",
        lambda d: d.edit(d.module("nvidia-modeset", "proprietary"), flip_crc("nvidia_get_rm_ops")),
    ),
    Specimen(
        "module_layout of another kernel",
        "modules.crcs",
        "open/nvidia-uvm.ko",
        lambda d: d.edit(d.module("nvidia-uvm"), flip_crc("module_layout")),
    ),
    Specimen(
        "versions removed",
        "modules.versions",
        "open/nvidia.ko",
        lambda d: d.edit(d.module("nvidia"), rename_section(b"__versions", b"__versionx")),
    ),
    Specimen(
        "release string edited",
        "modules.vermagic",
        "proprietary/nvidia.ko",
        lambda d: d.edit(d.module("nvidia", "proprietary"), swap_info(b"vermagic", lambda old: b"9" + old[1:])),
    ),
    Specimen(
        "vermagic flags edited",
        "modules.vermagic",
        "open/nvidia-drm.ko",
        lambda d: d.edit(d.module("nvidia-drm"), swap_info(b"vermagic", lambda old: old.replace(b" SMP", b" UP "))),
    ),
    Specimen(
        "version of another driver",
        "modules.version",
        "open/nvidia-peermem.ko",
        lambda d: d.edit(d.module("nvidia-peermem"), swap_info(b"version", lambda old: b"1" + old[1:])),
    ),
    Specimen("types swapped", "modules.licence", "open/nvidia.ko", lambda d: _swap_types(d, *MODULES)),
    Specimen(
        "one module swapped", "modules.source", "proprietary/nvidia-uvm.ko", lambda d: _swap_types(d, "nvidia-uvm")
    ),
    Specimen(
        "open uvm among proprietary siblings",
        "modules.gpl-only",
        "proprietary/nvidia-uvm.ko",
        lambda d: _swap_types(d, "nvidia-uvm"),
    ),
    Specimen(
        "licence of a GPL-only importer edited",
        "modules.gpl-only",
        "open/nvidia.ko",
        lambda d: d.edit(d.module("nvidia"), swap_info(b"license", lambda _: b"NVIDIA")),
    ),
    Specimen(
        "namespace not declared",
        "modules.namespaces",
        "open/nvidia.ko",
        lambda d: d.edit(d.module("nvidia"), swap_info(b"import_ns", lambda _: b"DMA_BUG")),
    ),
    Specimen(
        "import that nobody exports",
        "modules.imports",
        "open/nvidia-uvm.ko",
        lambda d: d.edit(d.module("nvidia-uvm"), swap_text(b"\0kmem_cache_free\0", b"\0kmem_cache_fred\0")),
    ),
    Specimen(
        "dependency not named",
        "modules.depends",
        "open/nvidia-uvm.ko",
        lambda d: d.edit(d.module("nvidia-uvm"), swap_info(b"depends", lambda _: b"")),
    ),
    Specimen(
        "module of another machine",
        "modules.machine",
        "open/nvidia.ko",
        lambda d: d.edit(d.module("nvidia"), other_machine),
    ),
    Specimen(
        "debug information left in",
        "modules.stripped",
        "open/nvidia-drm.ko",
        lambda d: d.edit(d.module("nvidia-drm"), rename_section(b".note.GNU-stack", b".debug_info_too")),
    ),
    Specimen(
        "symbols stripped away",
        "modules.imports",
        "open/nvidia-drm.ko",
        lambda d: d.edit(d.module("nvidia-drm"), rename_section(b".symtab", b".xymtab")),
    ),
    *(
        Specimen(
            f"{kind} {name} missing",
            "modules.present",
            f"{kind}/{name}.ko",
            lambda d, name=name, kind=kind: d.delete(d.module(name, kind)),  # type: ignore[misc]
        )
        for kind in ModuleType
        for name in MODULES
    ),
    Specimen(
        "one bit of code changed",
        "modules.bytes",
        "open/nvidia-uvm.ko",
        lambda d: d.edit(d.module("nvidia-uvm"), flip_in(".text")),
    ),
    Specimen(
        "something appended to a module",
        "modules.bytes",
        "proprietary/nvidia-drm.ko",
        lambda d: d.edit(d.module("nvidia-drm", "proprietary"), lambda data: data + b"~Module signature appended~\n"),
    ),
    Specimen(
        "build path in a module",
        "modules.build-paths",
        "open/nvidia-uvm.ko",
        lambda d: d.edit(d.module("nvidia-uvm"), swap_text(b"/src/kernel-open/", b"/tmp/kernel-open/")),
    ),
    Specimen(
        "module compressed",
        "modules.version",
        "open/nvidia-drm.ko",
        lambda d: d.edit(d.module("nvidia-drm"), gzip.compress),
    ),
    Specimen("module is a link", "modules.present", "open/nvidia-drm.ko", lambda d: _link_module(d, "nvidia-drm")),
    Specimen("module not readable", "modules.mode", "open/nvidia.ko", lambda d: d.set(d.module("nvidia"), mode=0o600)),
    Specimen(
        "type said to be absent that is there",
        "modules.types",
        "open",
        lambda d: d.put(f"{d.folder}/open.absent", b"it does not compile\n"),
    ),
    Specimen(
        "type missing without a rule",
        "modules.types",
        "open",
        lambda d: d.delete(*d.sound.below(f"{d.folder}/open")),
    ),
    Specimen(
        "no module at all",
        "modules.present",
        "proprietary/nvidia.ko",
        lambda d: d.delete(*(d.module(name, kind) for kind in ModuleType for name in MODULES)),
    ),
    Specimen("module empty", "modules.present", "open/nvidia.ko", lambda d: d.edit(d.module("nvidia"), lambda _: b"")),
    Specimen(
        "module cut short", "modules.imports", "open/nvidia.ko", lambda d: d.edit(d.module("nvidia"), lambda b: b[:-99])
    ),
    Specimen(
        "another module under its name",
        "modules.name",
        "open/nvidia-drm.ko",
        lambda d: d.edit(d.module("nvidia-drm"), lambda _: d.sound.read(d.module("nvidia-peermem"))),
    ),
    Specimen(
        "kernel build not named",
        "modules.kernel-build",
        "package",
        lambda d: d.edit(f"{d.folder}/package", lambda _: b"6.1.0-1\n"),
    ),
    Specimen(
        "modules of a kernel build that nobody planned",
        "modules.unexpected",
        "",
        lambda d: d.put(f"{paths.MODULES}/6.1.0-1-cloud-amd64-000000000000/open/nvidia.ko"),
    ),
    Specimen("module too many", "modules.unexpected", "", lambda d: d.put(d.module("nvidia-fs"))),
    # modules at work in their kernel
    Specimen(
        "crc flipped and loaded",
        "load.modules",
        "open/nvidia-modeset.ko",
        lambda d: d.edit(d.module("nvidia-modeset"), flip_crc("nvidia_get_rm_ops")),
    ),
    Specimen(
        "vermagic flags edited and loaded",
        "load.modules",
        "proprietary/nvidia-peermem.ko",
        lambda d: d.edit(
            d.module("nvidia-peermem", "proprietary"),
            swap_info(b"vermagic", lambda old: old.replace(b" SMP", b" UP ")),
        ),
    ),
    Specimen(
        "module cut short and loaded",
        "load.modules",
        "proprietary/nvidia-uvm.ko",
        lambda d: d.edit(d.module("nvidia-uvm", "proprietary"), lambda data: data[:-99]),
    ),
    Specimen(
        "empty module loaded",
        "load.modules",
        "proprietary/nvidia-drm.ko",
        lambda d: d.edit(d.module("nvidia-drm", "proprietary"), lambda _: b""),
    ),
    Specimen(
        "driver that says it is another",
        "load.version",
        "open",
        lambda d: d.edit(d.module("nvidia"), swap_text(b"x86_64  550.163.01  ", b"x86_64  550.163.02  ")),
    ),
    Specimen(
        "driver that gives the guest's answers itself",
        "load.version",
        "open",
        lambda d: d.edit(d.module("nvidia"), forging("\n@@ version/open status 0\r@@ taint/open status 0\v@@ end\n")),
    ),
    Specimen(
        "module that crashes the kernel",
        "load.modules",
        "open/nvidia-modeset.ko",
        lambda d: d.edit(d.module("nvidia-modeset"), crashing),
    ),
    Specimen(
        "module without an end",
        "load.unload",
        "proprietary",
        lambda d: d.edit(d.module("nvidia-uvm", "proprietary"), without_exit),
    ),
    Specimen(
        "module that has to be forced",
        "load.taint",
        "open",
        lambda d: d.edit(d.module("nvidia-drm"), rename_section(b"__versions", b"__versionx")),
    ),
    Specimen(
        "module of which no symbol is compared",
        "load.controls",
        "CRC flipped",
        lambda d: d.edit(d.module("nvidia-uvm"), layout_alone),
    ),
    # firmware
    Specimen(
        "firmware emptied",
        "modules.firmware",
        "open/nvidia.ko",
        lambda d: d.edit(_firmware(d)[0], lambda _: b""),
    ),
    Specimen("firmware missing", "modules.firmware", "open/nvidia.ko", lambda d: d.delete(_firmware(d)[-1])),
    Specimen(
        "firmware of another version",
        "modules.firmware",
        "proprietary/nvidia.ko",
        _rename_firmware,
    ),
    Specimen(
        "firmware damaged",
        "driver-root.bytes",
        "*",
        lambda d: d.edit(_firmware(d)[0], lambda data: flip(data, len(data) // 2)),
    ),
    Specimen("firmware where it is shadowed", "driver-root.shadowed", "", lambda d: d.put("usr/lib/firmware/nvidia/x")),
    Specimen("firmware is a link", "driver-root.files", "*", lambda d: d.become_link(_firmware(d)[0], "/dev/null")),
    # driver root
    Specimen(
        "licence missing",
        "driver-root.licences",
        "LICENSE",
        lambda d: d.delete(f"{ROOT}/usr/share/nvidia/LICENSE"),
    ),
    Specimen(
        "licence empty",
        "driver-root.licences",
        "supported-gpus/LICENSE",
        lambda d: d.edit(f"{ROOT}/usr/share/nvidia/supported-gpus/LICENSE", lambda _: b""),
    ),
    Specimen(
        "SONAME link dangling",
        "driver-root.links",
        "*",
        lambda d: d.set(f"{d.libraries}/libcuda.so.1", linkname="libcuda.so.1.1"),
    ),
    Specimen(
        "SONAME link to another library",
        "driver-root.soname",
        "*",
        lambda d: d.set(f"{d.libraries}/libcuda.so.1", linkname=f"libnvidia-ml.so.{d.plan.cell.driver}"),
    ),
    Specimen(
        "SONAME link flattened",
        "driver-root.links",
        "*",
        lambda d: d.become_file(f"{d.libraries}/libnvidia-ml.so.1", d.sound.read(_library(d, "libnvidia-ml"))),
    ),
    Specimen(
        "SONAME link out of the root",
        "driver-root.links",
        "*",
        lambda d: d.set(f"{d.libraries}/libcuda.so.1", linkname="/usr/lib/libcuda.so.1"),
    ),
    Specimen("SONAME link missing", "driver-root.toolkit", "*", lambda d: d.delete(f"{d.libraries}/libcuda.so.1")),
    Specimen(
        "library of another version",
        "driver-root.bytes",
        "*",
        lambda d: d.edit(_library(d, "libcuda"), swap_text(d.plan.cell.driver.encode(), b"550.1.1")),
    ),
    Specimen("library missing", "driver-root.files", "*", lambda d: d.delete(_library(d, "libnvidia-nvvm"))),
    Specimen(
        "needed library missing",
        "driver-root.needed",
        "*",
        lambda d: d.delete(f"{d.libraries}/libnvcuvid.so.1", _library(d, "libnvcuvid")),
    ),
    Specimen(
        "tool missing", "driver-root.toolkit", "nvidia-modprobe", lambda d: d.delete(f"{ROOT}/usr/bin/nvidia-modprobe")
    ),
    Specimen(
        "tool of another machine",
        "driver-root.machine",
        "usr/bin/nvidia-smi",
        lambda d: d.edit(f"{ROOT}/usr/bin/nvidia-smi", other_machine),
    ),
    Specimen(
        "tool not executable",
        "driver-root.files",
        "usr/bin/nvidia-modprobe",
        lambda d: d.set(f"{ROOT}/usr/bin/nvidia-modprobe", mode=0o644),
    ),
    Specimen("dev in the driver root", "driver-root.dev", "", lambda d: d.put(f"{ROOT}/dev", kind=tarfile.DIRTYPE)),
    Specimen(
        "device in the driver root",
        "driver-root.special",
        "",
        lambda d: d.put(f"{ROOT}/nvidia0", kind=tarfile.CHRTYPE, devmajor=195),
    ),
    Specimen(
        "empty folder too many",
        "driver-root.unexpected",
        "",
        lambda d: d.put(f"{ROOT}/empty", kind=tarfile.DIRTYPE),
    ),
    Specimen(
        "tool is a link",
        "driver-root.files",
        "usr/bin/nvidia-smi",
        lambda d: d.become_link(f"{ROOT}/usr/bin/nvidia-smi", "nvidia-modprobe"),
    ),
    Specimen(
        "tool wrapped in a script",
        "driver-root.bytes",
        "usr/bin/nvidia-smi",
        lambda d: d.edit(f"{ROOT}/usr/bin/nvidia-smi", lambda _: b"#!/bin/sh\nexit 0\n"),
    ),
    Specimen(
        "fabric manager from nowhere",
        "driver-root.components",
        "fabricmanager",
        lambda d: d.put(f"{ROOT}/usr/bin/nv-fabricmanager"),
    ),
    Specimen("file too many", "driver-root.unexpected", "", lambda d: d.put(f"{d.libraries}/libextra.so.1")),
    Specimen(
        "list of GPUs unreadable",
        "driver-root.supported-gpus",
        "",
        lambda d: d.edit(f"{ROOT}/usr/share/nvidia/supported-gpus/supported-gpus.json", lambda data: data[:-9]),
    ),
    # installer
    Specimen("installer part missing", "installer.files", _part("choose"), lambda d: d.delete(_part("choose"))),
    Specimen(
        "installer part not readable", "installer.files", _part("steps"), lambda d: d.set(_part("steps"), mode=0o600)
    ),
    Specimen(
        "installer part cut short",
        "installer.bytes",
        _part("modules"),
        lambda d: d.edit(_part("modules"), lambda data: data[: len(data) // 2]),
    ),
    Specimen(
        "entry point that sleeps",
        "installer.bytes",
        paths.ENTRYPOINT,
        lambda d: d.edit(paths.ENTRYPOINT, lambda data: data + b"sleep infinity\n"),
    ),
    Specimen(
        "facts of another driver",
        "installer.facts",
        "",
        lambda d: d.edit(_FACTS, lambda data: data.replace(b"VERSION=5", b"VERSION=4")),
    ),
    Specimen(
        "facts of another architecture",
        "installer.facts",
        "",
        lambda d: d.edit(_FACTS, lambda data: data.replace(b"x86_64", b"aarch64")),
    ),
    Specimen("installer part too many", "installer.unexpected", "", lambda d: d.put(_part("extra"))),
    # what one reader of archives sees and another does not
    Specimen(
        "file behind a number that Python cannot read", "layers.bytes", "installer", lambda d: _archive(d, _HIDDEN)
    ),
    Specimen(
        "owner in a header for all",
        "layers.bytes",
        "installer",
        lambda d: setattr(d, "archive", lambda data: header("g", b"8 uid=0\n", tarfile.XGLTYPE) + data),
    ),
    Specimen(
        "archive behind the end",
        "layers.bytes",
        "installer",
        lambda d: setattr(d, "archive", lambda data: data + header("etc/evil") + bytes(10240)),
    ),
    Specimen(
        "token behind the end",
        "layers.bytes",
        "installer",
        lambda d: setattr(d, "archive", lambda data: data + b"token=hunter2".ljust(512, b"\0")),
    ),
    Specimen(
        "folder of the base with other permissions",
        "layers.bytes",
        "installer",
        lambda d: _archive(d, header("tmp", kind=tarfile.DIRTYPE, mode=b"0000755")),
    ),
    Specimen(
        "empty folder elsewhere",
        "layers.bytes",
        "installer",
        lambda d: _archive(d, header("etc/evil.d", kind=tarfile.DIRTYPE, mode=b"0000755")),
    ),
    # compressed layers
    Specimen(
        "layer cut short",
        "layers.readable",
        "",
        lambda d: setattr(d, "encode", lambda tar: (oci.LAYER_ZSTD, zstandard.compress(tar)[:-100])),
    ),
    Specimen(
        "archive cut short",
        "layers.readable",
        "",
        lambda d: setattr(d, "archive", lambda data: data[: len(data) // 2]),
    ),
    Specimen(
        "frame to be skipped",
        "layers.streams",
        "",
        lambda d: setattr(d, "encode", lambda tar: (oci.LAYER_ZSTD, zstandard.compress(tar) + _SKIPPED)),
    ),
    Specimen(
        "frame that has no end",
        "layers.streams",
        "",
        lambda d: setattr(d, "encode", lambda tar: (oci.LAYER_ZSTD, _unfinished(tar))),
    ),
    Specimen(
        "zeros behind a gzip stream",
        "layers.streams",
        "",
        lambda d: setattr(d, "encode", lambda tar: (oci.LAYER_GZIP, gzip.compress(tar, mtime=0) + bytes(512))),
    ),
    Specimen(
        "clock in a gzip stream",
        "layers.streams",
        "",
        lambda d: setattr(d, "encode", lambda tar: (oci.LAYER_GZIP, gzip.compress(tar, mtime=1_700_000_000))),
    ),
    # documents
    Specimen(
        "name given twice in the manifest",
        "layers.blobs",
        "",
        lambda d: setattr(d, "manifest_text", lambda text: text.replace(b"{", b'{"schemaVersion": "secret", ', 1)),
    ),
    Specimen(
        "name given twice in the config",
        "layers.blobs",
        "",
        lambda d: setattr(d, "config_text", lambda text: text.replace(b"{", b'{"os": "secret", ', 1)),
    ),
    Specimen(
        "mark before the config", "layers.blobs", "", lambda d: setattr(d, "config_text", lambda text: _MARK + text)
    ),
    Specimen(
        "another number for two",
        "layers.manifest",
        "",
        lambda d: setattr(d, "edit_manifest", lambda m: m.update(schemaVersion=2.0)),
    ),
    Specimen(
        "index of another system",
        "layers.index",
        "",
        lambda d: setattr(d, "edit_index", lambda i: i["manifests"][0].update(platform=_WINDOWS)),
    ),
    Specimen(
        "data in the index",
        "layers.index",
        "",
        lambda d: setattr(d, "edit_index", lambda i: i["manifests"][0].update(data="eA==")),
    ),
    Specimen(
        "secret in the index",
        "config.secrets",
        "",
        lambda d: setattr(d, "edit_index", lambda i: i.update(annotations={"note": "password=hunter2"})),
    ),
    Specimen(
        "root file system of another kind", "config.settings", "", lambda d: d.config["rootfs"].update(type="foo")
    ),
    Specimen("setting in other letters", "config.settings", "", lambda d: d.run.update(entrypoint=None)),
    Specimen(
        "command that args of a pod would drop",
        "config.entrypoint",
        "",
        lambda d: d.run.update(Entrypoint=[], Cmd=[f"/{paths.ENTRYPOINT}", "init"]),
    ),
    Specimen("labels that are none", "config.labels", "*", lambda d: d.run.update(Labels=["x"])),
    Specimen(
        "foreign folder first",
        "config.environment",
        "",
        lambda d: d.run.update(Env=[line.replace("PATH=/usr/local/sbin", "PATH=/tmp") for line in d.run["Env"]]),
    ),
    Specimen("illegal tag", "tags.legal", "", lambda d: d.names.append(f"{d.plan.image_path}:550-6.1+x-debian12")),
    Specimen("name without a tag", "tags.unexpected", "", lambda d: d.names.append(d.plan.image_path)),
    Specimen(
        "short name of another kernel", "tags.unexpected", "", lambda d: d.names.append("550-6.9.9-evil-debian12")
    ),
    # layers
    Specimen(
        "setuid tool",
        "layers.permissions",
        "",
        lambda d: d.set(f"{ROOT}/usr/bin/nvidia-modprobe", mode=0o4755),
    ),
    Specimen("world-writable file", "layers.permissions", "", lambda d: d.set(f"{d.folder}/release", mode=0o666)),
    Specimen("setgid folder", "layers.permissions", "", lambda d: d.set(d.folder, mode=0o2755)),
    Specimen("world-writable folder", "layers.permissions", "", lambda d: d.set(d.folder, mode=0o777)),
    Specimen("folder for root alone", "layers.modes", "", lambda d: d.set(d.libraries, mode=0o700)),
    Specimen("folder of the base for root alone", "layers.modes", "", lambda d: d.set("opt", mode=0o700)),
    Specimen("file for root alone", "layers.modes", "", lambda d: d.set(f"{d.folder}/release", mode=0o600)),
    Specimen(
        "capability of a tool",
        "layers.attributes",
        "",
        lambda d: d.set(
            f"{ROOT}/usr/bin/nvidia-modprobe",
            pax_headers={"SCHILY.xattr.security.capability": "\x01\0\0\x02\0\0\x20\0"},
        ),
    ),
    Specimen(
        "access list",
        "layers.attributes",
        "",
        lambda d: d.set(f"{d.folder}/release", pax_headers={"SCHILY.acl.access": "user::rw-,user:1000:rw-"}),
    ),
    Specimen(
        "hard link",
        "layers.kinds",
        "",
        lambda d: d.put(f"{d.folder}/again", kind=tarfile.LNKTYPE, linkname="etc/passwd"),
    ),
    Specimen("pipe", "layers.kinds", "", lambda d: d.put(f"{paths.INSTALLER}/pipe", kind=tarfile.FIFOTYPE)),
    Specimen(
        "name with a dot", "layers.kinds", "", lambda d: d.set(f"{d.folder}/release", name=f"./{d.folder}/release")
    ),
    Specimen(
        "name from the root", "layers.kinds", "", lambda d: d.set(d.module("nvidia"), name=f"/{d.module('nvidia')}")
    ),
    Specimen("name that leads out", "layers.kinds", "", lambda d: d.put("opt/../../etc/shadow")),
    Specimen("owner by name", "layers.owner", "", lambda d: d.set(d.module("nvidia"), uname="builder")),
    Specimen("layer too many", "layers.order", "", lambda d: d.put(f"{d.folder}/open", kind=tarfile.DIRTYPE)),
    Specimen("layers in another order", "layers.order", "", lambda d: setattr(d, "edit_layers", _swap_last)),
    Specimen(
        "layer under another kind's name",
        "layers.media-types",
        "",
        lambda d: setattr(d, "edit_manifest", lambda m: m["layers"][-1].update(mediaType=oci.LAYER_GZIP)),
    ),
    Specimen(
        "manifest of another kind",
        "layers.media-types",
        "",
        lambda d: setattr(d, "edit_manifest", lambda m: m.update(mediaType=_DOCKER_MANIFEST)),
    ),
    Specimen(
        "config of another kind",
        "layers.media-types",
        "",
        lambda d: setattr(d, "edit_manifest", lambda m: m["config"].update(mediaType="application/json")),
    ),
    Specimen(
        "annotation",
        "layers.manifest",
        "",
        lambda d: setattr(d, "edit_manifest", lambda m: m.update(annotations={"built-on": "my-laptop"})),
    ),
    Specimen(
        "layer from a foreign place",
        "layers.manifest",
        "",
        lambda d: setattr(d, "edit_manifest", lambda m: m["layers"][0].update(urls=["https://mirror.example/blob"])),
    ),
    Specimen(
        "size of a layer untrue",
        "layers.blobs",
        "",
        lambda d: setattr(d, "edit_manifest", lambda m: m["layers"][-1].update(size=1)),
    ),
    Specimen(
        "index of another architecture",
        "layers.index",
        "",
        lambda d: setattr(d, "edit_index", lambda i: i["manifests"][0].update(platform=_ARM)),
    ),
    Specimen(
        "size in the index untrue",
        "layers.index",
        "",
        lambda d: setattr(d, "edit_index", lambda i: i["manifests"][0].update(size=1)),
    ),
    Specimen("foreign owner", "layers.owner", "", lambda d: d.set(d.module("nvidia"), uid=1000)),
    Specimen("clock in a layer", "layers.times", "", lambda d: d.set(d.module("nvidia"), mtime=1_700_000_000)),
    Specimen("file hidden by a whiteout", "layers.whiteouts", "", lambda d: d.put("etc/.wh.passwd", b"")),
    Specimen("folder made opaque", "layers.whiteouts", "", lambda d: d.put("etc/.wh..wh..opq", b"")),
    Specimen("file of the base replaced", "layers.replaced", "", lambda d: d.put("etc/passwd")),
    Specimen("link of the base replaced", "layers.replaced", "", lambda d: d.put("lib", kind=tarfile.DIRTYPE)),
    Specimen("file elsewhere", "layers.places", "", lambda d: d.put("srv/note")),
    Specimen("another base", "layers.base", "", _without_base),
    # config
    Specimen("another architecture", "config.architecture", "", lambda d: d.config.update(architecture="arm64")),
    Specimen("another system", "config.os", "", lambda d: d.config.update(os="windows")),
    Specimen("another user", "config.user", "", lambda d: d.run.update(User="nobody")),
    Specimen("another entry point", "config.entrypoint", "", lambda d: d.run.update(Entrypoint=["/bin/sh"])),
    Specimen("no command", "config.entrypoint", "", lambda d: d.run.pop("Cmd")),
    Specimen("entry point not executable", "config.command", "", lambda d: d.set(paths.ENTRYPOINT, mode=0o644)),
    Specimen("entry point missing", "config.command", "", lambda d: d.delete(paths.ENTRYPOINT)),
    Specimen("tools not on PATH", "config.path", "", lambda d: d.run.update(Env=["PATH=/usr/local/bin:/usr/bin"])),
    Specimen("no library path", "config.library-path", "", lambda d: d.run["Env"].pop()),
    Specimen("image without a shell", "config.userland", "sh", lambda d: d.put("usr/bin/.wh.sh", b"")),
    Specimen(
        "label of another kernel build",
        "config.labels",
        "io.gardenlinux.nvidia.kernel-build",
        lambda d: d.run["Labels"].update({"io.gardenlinux.nvidia.kernel-build": "0" * 64}),
    ),
    Specimen("label missing", "config.labels", "*", lambda d: d.run["Labels"].popitem()),
    Specimen("label too many", "config.no-other-labels", "", lambda d: d.run["Labels"].update(maintainer="me")),
    Specimen("library loaded first", "config.environment", "", lambda d: d.run["Env"].append("LD_PRELOAD=/tmp/x.so")),
    Specimen("variable given twice", "config.environment", "", lambda d: d.run["Env"].append("PATH=/usr/bin:/bin")),
    Specimen("working folder", "config.settings", "", lambda d: d.run.update(WorkingDir="/nowhere")),
    Specimen("volume", "config.settings", "", lambda d: d.run.update(Volumes={"/opt/nvidia": {}})),
    Specimen("health check", "config.settings", "", lambda d: d.run.update(Healthcheck={"Test": ["CMD", "true"]})),
    Specimen("stop signal", "config.settings", "", lambda d: d.run.update(StopSignal="SIGKILL")),
    Specimen("author", "config.settings", "", lambda d: d.config.update(author="me@my-laptop")),
    Specimen("variant of an architecture", "config.settings", "", lambda d: d.config.update(variant="v3")),
    Specimen("other words in the history", "config.history", "", lambda d: d.config["history"][-1].update(comment="x")),
    Specimen("history missing", "config.history", "", lambda d: d.config.pop("history")),
    Specimen("layer that the history denies", "config.history", "", lambda d: d.config["history"].pop()),
    Specimen("clock in the config", "config.history", "", lambda d: d.config.update(created="2025-01-01T00:00:00Z")),
    Specimen(
        "secret in the history",
        "config.secrets",
        "",
        lambda d: d.config["history"][-1].update(created_by="RUN curl -H 'Authorization: Bearer abcdef'"),
    ),
    Specimen(
        "secret in the environment", "config.secrets", "", lambda d: d.run["Env"].append("REGISTRY_PASSWORD=hunter2")
    ),
    Specimen(
        "build path in the history",
        "config.build-paths",
        "",
        lambda d: d.config["history"][-1].update(created_by="COPY /home/me/out /opt"),
    ),
    # tags
    Specimen("tag of another branch", "tags.unexpected", "", lambda d: _retag(d, ":550-", ":570-")),
    Specimen("tag without a branch", "tags.unexpected", "", lambda d: _retag(d, ":550-", ":-")),
    Specimen("tag of another kernel", "tags.unexpected", "", lambda d: _retag(d, "-6.1.0-", "-6.1.1-")),
    Specimen("tag of another system", "tags.unexpected", "", lambda d: _retag(d, "debian12", "debian11")),
    Specimen("tag without the architecture", "tags.unexpected", "", lambda d: _retag(d, "-amd64", "")),
    Specimen("tag missing", "tags.expected", "version", lambda d: d.names.remove(_version_name(d))),
    Specimen("no name", "tags.unexpected", "", lambda d: d.names.clear()),
    Specimen(
        "name of another repository",
        "tags.repository",
        "",
        lambda d: d.names.append(_version_name(d).replace("/driver:", "/other:")),
    ),
)


def _version_name(draft: Draft) -> str:
    return next(f"{draft.plan.image_path}:{tag.name}" for tag in draft.plan.tags if tag.kind == "version")
