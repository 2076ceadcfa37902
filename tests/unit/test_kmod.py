"""Modules and libraries are read from bytes: here from small ELF files of the tests' own making."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from builds import kmod
from builds.errors import BuildError
from builds.kmod import Export, Module

EM_X86_64, EM_AARCH64 = 62, 183
GLOBAL, WEAK = 1, 2

Symbol = tuple[str, str | None, int, int]
"""Name, section (None: undefined), value, binding."""


def elf(sections: Mapping[str, bytes], symbols: Sequence[Symbol] | None = (), machine: int = EM_X86_64) -> bytes:
    """A relocatable ELF file with sections and, unless None, a symbol table."""
    order = ["", *sections]
    contents = [b"", *sections.values()]
    kinds = [0] + [1] * len(sections)
    if symbols is not None:
        names, table = b"\0", struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
        for name, section, value, binding in symbols:
            index = order.index(section) if section else 0
            table += struct.pack("<IBBHQQ", len(names), binding << 4, 0, index, value, 0)
            names += name.encode() + b"\0"
        order += [".strtab", ".symtab"]
        contents += [names, table]
        kinds += [3, 2]
    order.append(".shstrtab")
    kinds.append(3)
    shstrtab = b"\0".join(name.encode() for name in order) + b"\0"
    contents.append(shstrtab)
    body, headers = b"", b""
    for name, data, kind in zip(order, contents, kinds, strict=True):
        at = shstrtab.index(name.encode() + b"\0") if not name else shstrtab.index(b"\0" + name.encode() + b"\0") + 1
        link, entry = (order.index(".strtab"), 24) if kind == 2 else (0, 0)
        headers += struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, 64 + len(body), len(data), link, 0, 1, entry)
        body += data
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    fields = struct.pack(
        "<HHIQQQIHHHHHH", 1, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(order), len(order) - 1
    )
    return ident + fields + body + headers


def library(soname: str | None, needed: Sequence[str], machine: int = EM_X86_64, interpreter: str = "") -> bytes:
    """A shared library, or a program where it has an interpreter: segments only, as the loader reads it."""
    strings, entries = b"\0", []
    for tag, name in [*((1, name) for name in needed), *([(14, soname)] if soname else [])]:
        entries.append((tag, len(strings)))
        strings += name.encode() + b"\0"
    count = 3 if interpreter else 2
    start = 64 + 56 * count
    dynamic_at = start + len(strings)
    interpreter_at = dynamic_at + 16 * (len(entries) + 3)
    entries += [(5, start), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)
    text = interpreter.encode() + b"\0"
    total = interpreter_at + len(text)
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, total, total, 4096)
    segments += struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, 0, len(dynamic), len(dynamic), 8)
    if interpreter:
        segments += struct.pack("<IIQQQQQQ", 3, 4, interpreter_at, interpreter_at, 0, len(text), len(text), 1)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    fields = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return ident + fields + segments + strings + dynamic + text


def version(name: str, crc: int) -> bytes:
    return struct.pack("<Q56s", crc, name.encode())


def module(
    *,
    info: Sequence[str] = ("license=GPL",),
    imports: Sequence[str] = (),
    weak: Sequence[str] = (),
    exports: Sequence[tuple[str, int, bool, str]] = (),
    versions: Mapping[str, int] | None = None,
    more: Mapping[str, bytes] | None = None,
) -> bytes:
    """A kernel module; ``exports`` are name, CRC, GPL-only, namespace."""
    sections = {
        ".gnu.linkonce.this_module": bytes(8),
        ".modinfo": b"\0\0".join(line.encode() for line in info) + b"\0",
        **(more or {}),
    }
    if versions is not None:
        sections["__versions"] = b"".join(version(name, crc) for name, crc in versions.items())
    symbols: list[Symbol] = [(name, None, 0, GLOBAL) for name in imports]
    symbols += [(name, None, 0, WEAK) for name in weak]
    strings = b""
    for suffix, gpl in (("", False), ("_gpl", True)):
        mine = [export for export in exports if export[2] is gpl]
        if not mine:
            continue
        sections[f"__ksymtab{suffix}"] = bytes(12 * len(mine))
        sections[f"__kcrctab{suffix}"] = b"".join(struct.pack("<I", crc) for _, crc, _, _ in mine)
        for number, (name, _, _, namespace) in enumerate(mine):
            symbols.append((f"__ksymtab_{name}", f"__ksymtab{suffix}", 12 * number, 0))
            symbols.append((f"__kstrtabns_{name}", "__ksymtab_strings", len(strings), 0))
            strings += namespace.encode() + b"\0"
    if strings:
        sections["__ksymtab_strings"] = strings
    return elf(sections, symbols)


def test_modinfo_keeps_every_value_and_every_space() -> None:
    info = (
        "license=Dual MIT/GPL",
        "firmware=nvidia/1/a.bin",
        "firmware=nvidia/1/b.bin",
        "vermagic=6.1.0 SMP ",
        "parm=x:y=z",
    )
    read = kmod.read_module("m.ko", module(info=info))
    assert read.info["firmware"] == ("nvidia/1/a.bin", "nvidia/1/b.bin")
    assert read.one("vermagic") == "6.1.0 SMP "
    assert read.one("parm") == "x:y=z"
    assert read.one("firmware") is None
    assert read.one("nothing") is None
    assert read.machine == "EM_X86_64"


def test_versions_of_both_forms() -> None:
    classic = kmod.read_module("m.ko", module(versions={"printk": 0xDEADBEEF, "module_layout": 1}))
    assert classic.versions == {"printk": 0xDEADBEEF, "module_layout": 1}
    more = {"__version_ext_crcs": struct.pack("<II", 7, 8), "__version_ext_names": b"a_long_name\0other\0"}
    assert kmod.read_module("m.ko", module(more=more)).versions == {"a_long_name": 7, "other": 8}
    assert kmod.read_module("m.ko", module()).versions == {}


def test_imports_and_exports() -> None:
    exports = [("one", 1, False, ""), ("two", 2, False, "NS"), ("three", 3, True, "")]
    read = kmod.read_module("nvidia.ko", module(imports=["printk"], weak=["maybe"], exports=exports))
    assert read.imports == {"printk"}
    assert read.weak_imports == {"maybe"}
    assert kmod.imported(read) == {"printk", "maybe"}
    assert read.exports == {
        "one": Export("one", 1, "nvidia", False),
        "two": Export("two", 2, "nvidia", False, "NS"),
        "three": Export("three", 3, "nvidia", True),
    }


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not an ELF file"),
        (b"<html>", "is not an ELF file"),
        (module()[:100], "is not an ELF file"),
        (elf({".modinfo": b"a=b\0", ".gnu.linkonce.this_module": b""}, None), "no section .symtab"),
        (elf({".modinfo": b"a=b\0"}), "no section .gnu.linkonce.this_module"),
        (elf({".gnu.linkonce.this_module": b""}), "no section .modinfo"),
        (module(more={"__versions": bytes(63)}), "is not an ELF file"),
    ],
)
def test_what_is_no_module_is_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(BuildError, match=rf"m\.ko: .*{says}"):
        kmod.read_module("m.ko", data)


def test_libraries_and_programs() -> None:
    read = kmod.read_elf("lib", library("libx.so.1", ["libc.so.6", "libm.so.6"], EM_AARCH64))
    assert read == kmod.Elf("EM_AARCH64", "libx.so.1", ("libc.so.6", "libm.so.6"), None)
    program = kmod.read_elf("tool", library(None, ["libc.so.6"], interpreter="/lib64/ld.so"))
    assert program == kmod.Elf("EM_X86_64", None, ("libc.so.6",), "/lib64/ld.so")
    assert kmod.is_elf(library(None, []))
    assert not kmod.is_elf(b"#!/bin/sh\n")
    with pytest.raises(BuildError, match="tool: is not an ELF file"):
        kmod.read_elf("tool", b"#!/bin/sh\n")


def test_symvers(tmp_path: Path) -> None:
    path = tmp_path / "Module.symvers"
    path.write_text(
        "0x4c9d28b0\tphys_base\tvmlinux\tEXPORT_SYMBOL\t\n"
        "0x84b45156\tinsert\tdrivers/cxl/core/cxl_core\tEXPORT_SYMBOL_GPL\tCXL\n"
        "0x00000000\told\tvmlinux\tEXPORT_SYMBOL\n"
    )
    assert kmod.read_symvers(path) == {
        "phys_base": Export("phys_base", 0x4C9D28B0, "vmlinux", False),
        "insert": Export("insert", 0x84B45156, "cxl_core", True, "CXL"),
        "old": Export("old", None, "vmlinux", False),
    }


@pytest.mark.parametrize("text", ["", "0x1 a b EXPORT_SYMBOL\n", "0x1\ta\tvmlinux\tEXPORT_UNUSED\t\n"])
def test_symvers_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "Module.symvers").write_text(text)
    with pytest.raises(BuildError, match=r"Module\.symvers"):
        kmod.read_symvers(tmp_path / "Module.symvers")


def parsed(licence: str, imports: Sequence[str] = (), exports: Sequence[str] = (), ns: Sequence[str] = ()) -> Module:
    info = [f"license={licence}", *(f"import_ns={name}" for name in ns)]
    return kmod.read_module(
        "m.ko", module(info=info, imports=imports, exports=[(name, 1, False, "") for name in exports])
    )


def test_taint_is_inherited_however_indirectly() -> None:
    modules = {
        "nvidia": parsed("NVIDIA", exports=["nv"]),
        "uvm": parsed("Dual MIT/GPL", imports=["nv"], exports=["uvm"]),
        "top": parsed("GPL", imports=["uvm"]),
        "free": parsed("GPL v2", imports=["printk"]),
    }
    assert kmod.tainted(modules) == {
        "nvidia": "licence NVIDIA",
        "uvm": "imports from nvidia",
        "top": "imports from uvm",
    }


@pytest.mark.parametrize("licence", ["MIT", "Linux-OpenIB", "Proprietary", "gpl", ""])
def test_licences_that_taint(licence: str) -> None:
    assert list(kmod.tainted({"m": parsed(licence)})) == ["m"]


def test_two_licences_must_both_be_free() -> None:
    both = kmod.read_module("m.ko", module(info=["license=GPL", "license=NVIDIA"]))
    assert not both.gpl_compatible
    assert not kmod.read_module("m.ko", module(info=["name=x"])).gpl_compatible


def test_namespaces() -> None:
    plain, declared = parsed("GPL"), parsed("GPL", ns=["DMA_BUF"])
    assert kmod.admits("", plain, "nvidia")
    assert kmod.admits("DMA_BUF", declared, "nvidia")
    assert not kmod.admits("DMA_BUF", plain, "nvidia")
    assert kmod.admits("module:kvm,nvidia-uvm", plain, "nvidia_uvm")
    assert kmod.admits("module:nvidia-*", plain, "nvidia-uvm")
    assert not kmod.admits("module:kvm", plain, "nvidia")


def test_siblings_lend_to_each_other_but_not_to_themselves() -> None:
    kernel = {"printk": Export("printk", 1, "vmlinux", False)}
    modules = {"a": parsed("GPL", exports=["of_a"]), "b": parsed("GPL", exports=["of_b"])}
    assert kmod.providers(kernel, modules, "a").keys() == {"printk", "of_b"}
