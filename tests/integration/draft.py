"""A sound image taken apart, to be spoiled: every change is a line, and costs no compression and no rebuild.

Layers lie uncompressed, so that spoiling one file leaves the others as they are.
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
    members: dict[str, tarfile.TarInfo]

    def files(self) -> list[str]:
        """Every regular file that is not empty, sorted."""
        return sorted(path for path, info in self.members.items() if info.isreg() and info.size)

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
    members: dict[str, tarfile.TarInfo] = {}
    for number, layer in enumerate(image.layers):
        path = oci.blob_path(layout, layer.diff_id)
        with oci.open_layer(image.layout, layer.descriptor) as stream, path.open("wb") as file:
            while chunk := stream.read(1 << 20):
                file.write(chunk)
        layers.append(Layer(Descriptor(oci.LAYER_TAR, layer.diff_id, path.stat().st_size), layer.diff_id))
        with tarfile.open(path) as archive:
            found = {member.name: member for member in archive}
        layer_of |= dict.fromkeys(found, number)
        members |= found
    thawed = _write(layout, layers, dict(image.config), oci.names_of(image.layout, image.digest))
    return Sound(thawed, plan, base, layer_of, members)


class Draft:
    """A copy of the sound image, to be spoiled."""

    def __init__(self, sound: Sound) -> None:
        self.sound, self.plan = sound, sound.plan
        self.config: dict[str, Any] = copy.deepcopy(dict(sound.image.config))
        self.names = list(oci.names_of(sound.image.layout, sound.image.digest))
        self.damaged = False
        self.edit_manifest: Callable[[dict[str, Any]], object] = lambda _: None
        self.edit_index: Callable[[dict[str, Any]], object] = lambda _: None
        self.edit_layers: Callable[[list[Layer]], object] = lambda _: None
        """Change manifest, index or the list of layers once they are known."""
        self.config_text: Callable[[bytes], bytes] = lambda data: data
        self.manifest_text: Callable[[bytes], bytes] = lambda data: data
        """Change the JSON as it is written."""
        self.archive: Callable[[bytes], bytes] = lambda data: data
        self.encode: Callable[[bytes], tuple[str, bytes]] = lambda data: (oci.LAYER_TAR, data)
        """Change the installer's layer: the archive as it is written, and how it is compressed."""
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
        return f"{paths.MODULES}/{self.plan.sets[0].id}"

    @property
    def libraries(self) -> str:
        """Folder of the libraries."""
        return f"{ROOT}/usr/lib/{self.plan.cell.arch.triplet}"

    def mode(self, path: str) -> int:
        """Permissions of a member in the sound image."""
        return self.sound.members[path].mode

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
            return _member(info.name, tarfile.REGTYPE, mode=0o755), data

        self._change(path, apply)

    def become_link(self, path: str, target: str) -> None:
        """Put a link in place of a file."""
        self._change(path, lambda info, _: (_member(info.name, tarfile.SYMTYPE, linkname=target), b""))

    def delete(self, *names: str) -> None:
        """Leave files out, as if they had never been packed."""
        for name in names:
            self._change(name, lambda _info, _data: None)

    def put(self, path: str, data: bytes = b"x", *, kind: bytes = tarfile.REGTYPE, **attributes: Any) -> None:
        """Add something in a layer on top."""
        self._added.append((_member(path, kind, **attributes), data if kind == tarfile.REGTYPE else b""))

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
        installer = self.sound.layer_of[paths.ENTRYPOINT]
        layers[installer] = self._recode(layout, layers[installer])
        self.edit_layers(layers)
        image = _write(
            layout,
            layers,
            self.config,
            self.names,
            self.edit_manifest,
            (self.config_text, self.manifest_text),
            keep_diff_ids=self.damaged,
        )
        index = json.loads((layout / "index.json").read_text())
        self.edit_index(index)
        (layout / "index.json").write_text(json.dumps(index))
        return image

    def _change(self, path: str, change: Change) -> None:
        assert path in self.sound.layer_of, f"the sound image has no {path}"
        self._changes[path] = change

    def _recode(self, layout: Path, layer: Layer) -> Layer:
        path = oci.blob_path(layout, layer.descriptor.digest)
        old = path.read_bytes()
        new = self.archive(old)
        media_type, data = self.encode(new)
        if data == old:
            return layer
        blob = oci.add_bytes(layout, data, media_type)
        return Layer(blob, f"sha256:{hashlib.sha256(new).hexdigest()}")

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


def _member(path: str, kind: bytes, **attributes: Any) -> tarfile.TarInfo:
    """A member of a layer as the packer would write it, but for the attributes given."""
    info = tarfile.TarInfo(path)
    info.type, info.mode, info.mtime = kind, 0o755 if kind == tarfile.DIRTYPE else 0o644, oci.EPOCH
    for name, value in attributes.items():
        setattr(info, name, value)
    return info


def _write(
    layout: Path,
    layers: list[Layer],
    config: dict[str, Any],
    names: Any,
    edit: Callable[[dict[str, Any]], object] = lambda _: None,
    texts: tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]] = (lambda data: data, lambda data: data),
    *,
    keep_diff_ids: bool = False,
) -> Image:
    if not keep_diff_ids:
        config = {**config, "rootfs": {**config["rootfs"], "diff_ids": [layer.diff_id for layer in layers]}}
    blob = oci.add_bytes(layout, texts[0](json.dumps(config, sort_keys=True).encode()), oci.CONFIG)
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.MANIFEST,
        "config": blob.to_json(),
        "layers": [layer.descriptor.to_json() for layer in layers],
    }
    edit(manifest)
    descriptor = oci.add_bytes(layout, texts[1](json.dumps(manifest).encode()), oci.MANIFEST)
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


def header(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: bytes) -> bytes:
    """A member of an archive as bytes, with fields of its header (``mode``, ``uid``) as they are given."""
    info = _member(name, kind)
    info.size = len(data)
    raw = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    for field, value in fields.items():
        start, size = {"mode": (100, 8), "uid": (108, 8)}[field]
        raw[start : start + size] = value.ljust(size, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw) + data + bytes(-len(data) % 512)


def into(extra: bytes) -> Callable[[bytes], bytes]:
    """Add members to an archive, before its end."""

    def change(data: bytes) -> bytes:
        end = len(data.rstrip(b"\0")) + 511 & ~511
        return data[:end] + extra + bytes(10240)

    return change


def flip_in(name: str) -> Callable[[bytes], bytes]:
    """Change one bit in the middle of a section."""

    def change(data: bytes) -> bytes:
        offset, size = section(data, name)
        return flip(data, offset + size // 2)

    return change


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


def crashing(data: bytes) -> bytes:
    """A module whose start is an instruction that no processor has."""
    return _start_with(data, b"\x0f\x0b")


def looping(data: bytes) -> bytes:
    """A module whose start never ends: a jump to itself."""
    return _start_with(data, b"\xeb\xfe")


def _start_with(data: bytes, code: bytes) -> bytes:
    """Put x86 code into a module's init function, behind the call that the kernel itself writes there."""
    elf = ELFFile(io.BytesIO(data))
    symbols: Any = elf.get_section_by_name(".symtab")
    (start,) = symbols.get_symbol_by_name("init_module")
    at = elf.get_section(start["st_shndx"])["sh_offset"] + start["st_value"]
    at += 5 if data[at] == 0xE8 else 0
    return data[:at] + code + data[at + len(code) :]


def forging(words: str) -> Callable[[bytes], bytes]:
    """An nvidia.ko that says something else instead of its version: in /proc, and on the console as an emergency."""

    def change(data: bytes) -> bytes:
        begin = data.index(b"nvidia id: ") + len(b"nvidia id: ")
        text = words.encode().ljust(data.index(b"\0", begin) - begin, b" ")
        data = data[:begin] + text + data[begin + len(text) :]
        return swap_text(b"NVRM: loading %s\n", b"\x010RM: load %s\n")(data)

    return change


def without_exit(data: bytes) -> bytes:
    """A module that does not say how it ends: the relocation of its exit function is made one of no effect."""
    elf = ELFFile(io.BytesIO(data))
    relocations: Any = elf.get_section_by_name(".rela.gnu.linkonce.this_module")
    symbols: Any = elf.get_section(relocations["sh_link"])
    for number, one in enumerate(relocations.iter_relocations()):
        if symbols.get_symbol(one["r_info_sym"]).name == "cleanup_module":
            info = relocations["sh_offset"] + number * relocations["sh_entsize"] + 8
            return data[:info] + bytes(4) + data[info + 4 :]  # the lower half is the type; 0 is R_*_NONE
    raise AssertionError("it has no exit function")


def layout_alone(data: bytes) -> bytes:
    """A module that knows the CRC of the kernel's own layout and of no symbol else."""
    elf = ELFFile(io.BytesIO(data))
    number = elf.get_section_index("__versions")
    offset, size = section(data, "__versions")
    entry = next(
        data[at : at + 64] for at in range(offset, offset + size, 64) if data[at + 8 :].startswith(b"module_layout\0")
    )
    at = elf["e_shoff"] + number * elf["e_shentsize"] + 32  # where its header has the size
    data = data[:at] + (64).to_bytes(8, "little") + data[at + 8 :]
    return data[:offset] + entry + data[offset + 64 :]


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


def damage_layer(image: Image) -> None:
    """Change a bit of a layer's blob in place, as a failing disk would."""
    path = oci.blob_path(image.layout, image.layers[-1].descriptor.digest)
    data = path.read_bytes()
    path.unlink()  # it may be a hard link
    path.write_bytes(flip(data, len(data) // 2))
