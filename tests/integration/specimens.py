"""Images that are wrong on purpose: small mutations of a sound one, each with the check that must refuse it.

A mutation works on a :class:`Draft` of the sound image and is a line or two; a new one is an entry in SPECIMENS.
Layers lie uncompressed, so that spoiling one file costs no compression.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from builds import oci, paths
from builds.model import MODULES, ModuleType
from builds.oci import Descriptor, Image, Layer
from builds.plan import Plan

ROOT = paths.DRIVER_ROOT

Change = Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes] | None]
"""Gives the new form of a member; None deletes it."""


@dataclass(frozen=True)
class Sound:
    """The sound image with its layers uncompressed, and which layer has what."""

    image: Image
    plan: Plan
    base: int
    """How many of its layers are the base's."""
    layer_of: dict[str, int]

    def read(self, path: str) -> bytes:
        """Content of a file."""
        blob = oci.blob_path(self.image.layout, self.image.layers[self.layer_of[path]].descriptor.digest)
        with tarfile.open(blob) as archive:
            stream = archive.extractfile(path)
            assert stream
            return stream.read()

    def below(self, folder: str) -> list[str]:
        """Everything below a folder, sorted."""
        return sorted(path for path in self.layer_of if path.startswith(f"{folder}/"))


def thaw(image: Image, plan: Plan, base: int, layout: Path) -> Sound:
    """A copy of an image whose layers are uncompressed. Its digest is another, its diff ids are the same."""
    oci.create(layout)
    layers: list[Layer] = []
    layer_of: dict[str, int] = {}
    for number, layer in enumerate(image.layers):
        path = oci.blob_path(layout, layer.diff_id)
        with oci.open_layer(image.layout, layer.descriptor) as stream, path.open("wb") as file:
            while chunk := stream.read(1 << 20):
                file.write(chunk)
        layers.append(Layer(Descriptor(oci.LAYER_TAR, layer.diff_id, path.stat().st_size), layer.diff_id))
        with tarfile.open(path) as archive:
            layer_of |= {member.name: number for member in archive}
    thawed = _write(layout, layers, dict(image.config), oci.names_of(image.layout, image.digest))
    return Sound(thawed, plan, base, layer_of)


class Draft:
    """A copy of the sound image, to be spoiled."""

    def __init__(self, sound: Sound) -> None:
        self.sound, self.plan = sound, sound.plan
        self.config: dict[str, Any] = copy.deepcopy(dict(sound.image.config))
        self.names = list(oci.names_of(sound.image.layout, sound.image.digest))
        self.damaged = False
        self._changes: dict[str, Change] = {}
        self._added: list[tuple[tarfile.TarInfo, bytes]] = []

    @property
    def run(self) -> dict[str, Any]:
        """How a runtime is to start it."""
        return self.config["config"]  # type: ignore[no-any-return]

    def module(self, name: str, kind: str = "open") -> str:
        """Path of a module."""
        return f"{self.folder}/{kind}/{name}.ko"

    @property
    def folder(self) -> str:
        """Folder of the modules."""
        return f"{paths.MODULES}/{self.plan.kernel.build.id}"

    @property
    def libraries(self) -> str:
        """Folder of the libraries."""
        return f"{ROOT}/usr/lib/{self.plan.cell.arch.triplet}"

    def edit(self, path: str, change: Callable[[bytes], bytes]) -> None:
        """Change a file's content."""

        def apply(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
            new = change(data)
            assert new != data, f"{path} is not spoiled"
            return info, new

        self._change(path, apply)

    def set(self, path: str, **attributes: Any) -> None:
        """Change what the tar says of a member: mode, uid, mtime, linkname …"""

        def apply(info: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
            changed = copy.deepcopy(info)  # TarInfo.replace() is younger than Debian 12's Python
            for attribute, value in attributes.items():
                setattr(changed, attribute, value)
            return changed, data

        self._change(path, apply)

    def become_file(self, path: str, data: bytes) -> None:
        """Put a file in place of a link."""

        def apply(info: tarfile.TarInfo, _data: bytes) -> tuple[tarfile.TarInfo, bytes]:
            new = tarfile.TarInfo(info.name)
            new.mode, new.mtime = 0o755, info.mtime
            return new, data

        self._change(path, apply)

    def delete(self, *names: str) -> None:
        """Leave files out, as if they had never been packed."""
        for name in names:
            self._change(name, lambda _info, _data: None)

    def put(self, path: str, data: bytes = b"x", *, kind: bytes = tarfile.REGTYPE, **attributes: Any) -> None:
        """Add something in a layer on top."""
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.mtime = kind, 0o755 if kind == tarfile.DIRTYPE else 0o644, oci.EPOCH
        for name, value in attributes.items():
            setattr(info, name, value)
        self._added.append((info, data if kind == tarfile.REGTYPE else b""))

    def write(self, layout: Path) -> Image:
        """Write the spoiled image. Blobs that are as before are hard links."""
        oci.create(layout)
        layers = list(self.sound.image.layers)
        for number in {self.sound.layer_of[path] for path in self._changes}:
            layers[number] = self._rewrite(layout, number)
        for layer in layers:
            source = oci.blob_path(self.sound.image.layout, layer.descriptor.digest)
            if not oci.blob_path(layout, layer.descriptor.digest).exists():
                os.link(source, oci.blob_path(layout, layer.descriptor.digest))
        if self._added:
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for info, data in self._added:
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            blob = oci.add_bytes(layout, stream.getvalue(), oci.LAYER_TAR)
            layers.append(Layer(blob, blob.digest))
            self.config["history"].append({"created": oci.CREATED, "created_by": "spoiled"})
        return _write(layout, layers, self.config, self.names, keep_diff_ids=self.damaged)

    def _change(self, path: str, change: Change) -> None:
        assert path in self.sound.layer_of, f"the sound image has no {path}"
        self._changes[path] = change

    def _rewrite(self, layout: Path, number: int) -> Layer:
        source = oci.blob_path(self.sound.image.layout, self.sound.image.layers[number].descriptor.digest)
        part = layout / "layer.part"
        with tarfile.open(source) as old, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as new:
            for info in old:
                content = old.extractfile(info) if info.isfile() else None
                if info.name not in self._changes:
                    new.addfile(info, content)
                elif changed := self._changes[info.name](info, content.read() if content else b""):
                    changed[0].size = len(changed[1])
                    new.addfile(changed[0], io.BytesIO(changed[1]))
        with part.open("rb") as stream:
            digest = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        part.rename(oci.blob_path(layout, digest))
        return Layer(Descriptor(oci.LAYER_TAR, digest, oci.blob_path(layout, digest).stat().st_size), digest)


def _write(
    layout: Path, layers: list[Layer], config: dict[str, Any], names: Any, *, keep_diff_ids: bool = False
) -> Image:
    if not keep_diff_ids:
        config = {**config, "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}}
    blob = oci.add_bytes(layout, json.dumps(config, sort_keys=True).encode(), oci.CONFIG)
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.MANIFEST,
        "config": blob.to_json(),
        "layers": [layer.descriptor.to_json() for layer in layers],
    }
    descriptor = oci.add_bytes(layout, json.dumps(manifest).encode(), oci.MANIFEST)
    oci.name_image(layout, descriptor, names)
    return Image(layout, descriptor, manifest, config)


def section(data: bytes, name: str) -> tuple[int, int]:
    """Where a section of an ELF file is: offset and size."""
    found = ELFFile(io.BytesIO(data)).get_section_by_name(name)
    assert found is not None, name
    return int(found["sh_offset"]), int(found["sh_size"])


def flip(data: bytes, offset: int) -> bytes:
    """Change one bit."""
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def flip_crc(symbol: str) -> Callable[[bytes], bytes]:
    """Change the CRC that a module expects of a symbol."""

    def change(data: bytes) -> bytes:
        offset, size = section(data, "__versions")
        at = data.index(b"\0" + symbol.encode() + b"\0", offset, offset + size) + 1 - 8
        return flip(data, at)

    return change


def swap_text(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Replace text by text of the same length, everywhere."""
    assert len(new) <= len(old)
    return lambda data: data.replace(old, new.ljust(len(old), b"\0"))


def swap_info(key: bytes, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Change the value of a module's modinfo, not its length."""

    def apply(data: bytes) -> bytes:
        offset, size = section(data, ".modinfo")
        old = re.search(rb"(?:^|\0)" + key + rb"=([^\0]*)", data[offset : offset + size])
        assert old, key
        new = change(old[1]).ljust(len(old[1]), b"\0")
        assert len(new) == len(old[1])
        return data[: offset + old.start(1)] + new + data[offset + old.end(1) :]

    return apply


def rename_section(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Rename a section of an ELF file."""
    assert len(old) == len(new)

    def change(data: bytes) -> bytes:
        offset, size = section(data, ".shstrtab")
        at = data.index(b"\0" + old + b"\0", offset, offset + size) + 1
        return data[:at] + new + data[at + len(new) :]

    return change


def other_machine(data: bytes) -> bytes:
    """The same ELF file for another architecture, as its header says."""
    return data[:18] + (b"\xb7\x00" if data[18:20] == b"\x3e\x00" else b"\x3e\x00") + data[20:]


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
    Specimen("module missing", "modules.present", "open/nvidia-uvm.ko", lambda d: d.delete(d.module("nvidia-uvm"))),
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
    Specimen("module too many", "modules.unexpected", "", lambda d: d.put(d.module("nvidia-fs"))),
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
    Specimen("file too many", "driver-root.unexpected", "", lambda d: d.put(f"{d.libraries}/libextra.so.1")),
    Specimen(
        "list of GPUs unreadable",
        "driver-root.supported-gpus",
        "",
        lambda d: d.edit(f"{ROOT}/usr/share/nvidia/supported-gpus/supported-gpus.json", lambda data: data[:-9]),
    ),
    # layers
    Specimen(
        "setuid tool",
        "layers.permissions",
        "",
        lambda d: d.set(f"{ROOT}/usr/bin/nvidia-modprobe", mode=0o4755),
    ),
    Specimen("world-writable file", "layers.permissions", "", lambda d: d.set(f"{d.folder}/release", mode=0o666)),
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


def damage_layer(image: Image) -> None:
    """Change a bit of a layer's blob in place, as a failing disk would."""
    path = oci.blob_path(image.layout, image.layers[-1].descriptor.digest)
    data = path.read_bytes()
    path.unlink()  # it may be a hard link
    path.write_bytes(flip(data, len(data) // 2))
