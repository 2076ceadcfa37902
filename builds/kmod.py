"""Kernel modules and libraries as data: what an ELF file says of itself, read from its bytes.

The layouts are the kernel's own (include/linux/export-internal.h, include/linux/module.h, scripts/mod/modpost.c):
``.modinfo`` holds ``key=value`` strings, ``__versions`` a 64-byte entry per imported symbol (CRC, name), or since
6.14 ``__version_ext_crcs`` and ``__version_ext_names``; exports stand in ``__ksymtab`` and ``__ksymtab_gpl`` with
their CRCs, in the same order, in ``__kcrctab`` and ``__kcrctab_gpl``.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from .errors import BuildError

_MAGIC = b"\x7fELF"
_UNDEFINED = 0  # st_shndx of an undefined symbol
_WEAK = 2  # binding of a symbol that may stay undefined
_VERSION_ENTRY = 64  # bytes: an unsigned long and the name (MODULE_NAME_LEN leaves it the rest)

GPL_COMPATIBLE = frozenset(
    {"GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL"}
)
"""Licences whose modules may use GPL-only symbols (include/linux/license.h)."""

LAYOUT_SYMBOL = "module_layout"
"""The symbol whose CRC stands for the layout of the kernel's own structures; modpost adds it to every module."""


@dataclass(frozen=True)
class Export:
    """A symbol that a kernel or a module lends to modules."""

    name: str
    crc: int | None
    """CRC of its type; None where it was built without MODVERSIONS."""
    module: str
    """``vmlinux``, or the file name of the module that has it, without folder and suffix."""
    gpl: bool
    """Whether only modules of a GPL-compatible licence may import it."""
    namespace: str = ""


@dataclass(frozen=True)
class Module:
    """What a kernel module says of itself."""

    machine: str
    """``e_machine``, as pyelftools spells it."""
    info: Mapping[str, tuple[str, ...]]
    """Its modinfo: all values of each key, in file order, spaces kept (vermagic ends with one)."""
    versions: Mapping[str, int]
    """CRC that it expects of each symbol; empty without MODVERSIONS."""
    imports: frozenset[str]
    """Symbols that it needs from the kernel or from other modules."""
    weak_imports: frozenset[str]
    """Symbols that it uses where they exist."""
    exports: Mapping[str, Export]
    sections: frozenset[str]
    """Names of its sections."""

    def one(self, key: str) -> str | None:
        """The value of a modinfo key that stands once; None where it is missing or ambiguous."""
        values = self.info.get(key, ())
        return values[0] if len(values) == 1 else None

    @property
    def gpl_compatible(self) -> bool:
        """Whether the kernel takes its licence for GPL-compatible."""
        licences = self.info.get("license", ())
        return bool(licences) and all(licence in GPL_COMPATIBLE for licence in licences)


@dataclass(frozen=True)
class Elf:
    """What a program or a library says of itself."""

    machine: str
    soname: str | None
    needed: tuple[str, ...]
    """Libraries that it asks the loader for, by SONAME."""
    interpreter: str | None
    """Path of the loader, of a dynamically linked program."""


def is_elf(data: bytes) -> bool:
    """Whether bytes are an ELF file."""
    return data.startswith(_MAGIC)


def read_elf(name: str, data: bytes) -> Elf:
    """Read a program or library; ``name`` is what errors call it. Raises BuildError where it cannot be read."""
    with readable(name):
        elf = ELFFile(io.BytesIO(data))
        interpreter, soname, needed = None, None, []
        segments: list[Any] = list(elf.iter_segments())
        for segment in segments:
            if segment["p_type"] == "PT_INTERP":
                interpreter = str(segment.get_interp_name())
            elif isinstance(segment, DynamicSegment):
                tags: list[Any] = list(segment.iter_tags())
                for tag in tags:
                    if tag.entry.d_tag == "DT_SONAME":
                        soname = str(tag.soname)
                    elif tag.entry.d_tag == "DT_NEEDED":
                        needed.append(str(tag.needed))
        return Elf(str(elf["e_machine"]), soname, tuple(needed), interpreter)
    raise AssertionError("unreachable")


def read_module(name: str, data: bytes) -> Module:
    """Read a kernel module; ``name`` is what errors call it.

    Raises BuildError where it cannot be read, or lacks what the kernel's loader cannot do without: the module's own
    structure, its modinfo, its symbol table. So nobody mistakes a stripped file for one that imports nothing.
    """
    with readable(name):
        elf = ELFFile(io.BytesIO(data))
        names = [section.name for section in elf.iter_sections()]
        for section in (".gnu.linkonce.this_module", ".modinfo", ".symtab"):
            if section not in names:
                raise BuildError(name, "is not a module that the kernel can load", got=f"no section {section}")
        symbols = list(_symbols(elf))
        info = _modinfo(_data(elf, ".modinfo"))
        undefined = [(symbol.name, symbol.weak) for symbol in symbols if symbol.section == _UNDEFINED and symbol.name]
        return Module(
            machine=str(elf["e_machine"]),
            info=info,
            versions={name: crc for name, crc, _ in version_entries(elf)},
            imports=frozenset(symbol for symbol, weak in undefined if not weak),
            weak_imports=frozenset(symbol for symbol, weak in undefined if weak),
            exports={export.name: export for export in _exports(elf, names, symbols, Path(name).stem)},
            sections=frozenset(names),
        )
    raise AssertionError("unreachable")


def read_symvers(path: Path) -> dict[str, Export]:
    """Read a ``Module.symvers``: CRC, symbol, module, export type and namespace, separated by tabs.

    A CRC of zero is that of a kernel without MODVERSIONS. Raises BuildError for a line of another form.
    """
    exports: dict[str, Export] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("\t")
        if len(fields) not in (4, 5) or not re.fullmatch(r"EXPORT_SYMBOL(_GPL)?", fields[3]):
            raise BuildError("Module.symvers", f"line {number} is not that of an exported symbol", got=repr(line))
        crc, name, module, kind = fields[:4]
        exports[name] = Export(
            name, int(crc, 16) or None, Path(module).name, kind.endswith("_GPL"), "".join(fields[4:])
        )
    if not exports:
        raise BuildError("Module.symvers", "names no symbol")
    return exports


def tainted(modules: Mapping[str, Module]) -> dict[str, str]:
    """Modules of a set that may not use GPL-only symbols, by name, each with the reason.

    Those of a licence that is not GPL-compatible, and those that import from such a module, however indirectly: the
    kernel has them inherit the taint (``inherit_taint`` in kernel/module/main.c, since 5.9).
    """
    reasons = {
        name: f"licence {', '.join(module.info.get('license', ())) or 'missing'}"
        for name, module in modules.items()
        if not module.gpl_compatible
    }
    while True:
        more = {
            name: f"imports from {lender}"
            for name, module in modules.items()
            if name not in reasons
            for lender in sorted(reasons)
            if (module.imports | module.weak_imports) & modules[lender].exports.keys()
        }
        if not more:
            return reasons
        reasons.update(more)


def admits(namespace: str, module: Module, name: str) -> bool:
    """Whether a module may import a symbol of a namespace.

    It must declare the namespace (``import_ns``); one of the form ``module:<names>`` admits the modules it names.
    """
    if not namespace:
        return True
    if namespace.startswith("module:"):
        patterns = namespace.removeprefix("module:").replace("-", "_").split(",")
        return any(fnmatchcase(name.replace("-", "_"), pattern) for pattern in patterns)
    return namespace in module.info.get("import_ns", ())


@dataclass(frozen=True)
class _Symbol:
    name: str
    section: int
    value: int
    weak: bool


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn whatever a damaged ELF file makes its reader stumble over into one error that names the file."""
    try:
        yield
    except (
        ELFError,
        struct.error,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        OverflowError,
        AssertionError,
    ) as error:
        raise BuildError(name, "is not an ELF file that can be read", got=str(error) or type(error).__name__) from error


def _data(elf: ELFFile, name: str) -> bytes:
    section = elf.get_section_by_name(name)
    return bytes(section.data()) if section is not None else b""


def _offset(elf: ELFFile, name: str) -> int:
    section: Any = elf.get_section_by_name(name)
    return int(section["sh_offset"])


def _order(elf: ELFFile) -> str:
    return "<" if elf.little_endian else ">"


def _symbols(elf: ELFFile) -> Iterator[_Symbol]:
    """The symbol table, unpacked in one go: a driver module has 100,000 symbols, which pyelftools reads one by one."""
    table: Any = elf.get_section_by_name(".symtab")
    names = bytes(elf.get_section(table["sh_link"]).data())
    entry = struct.Struct(_order(elf) + "IBBHQQ")
    for name, info, _, section, value, _size in entry.iter_unpack(bytes(table.data())):
        yield _Symbol(_string(names, name), section, value, info >> 4 == _WEAK)


def _string(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


def _modinfo(data: bytes) -> dict[str, tuple[str, ...]]:
    info: dict[str, tuple[str, ...]] = {}
    for text in filter(None, data.decode(errors="replace").split("\0")):
        key, _, value = text.partition("=")
        info[key] = (*info.get(key, ()), value)
    return info


def version_entries(elf: ELFFile) -> Iterator[tuple[str, int, int]]:
    """Each symbol that a module imports by CRC: its name, its CRC, and where in the file that is, in either form.

    Of a damaged module this raises what :func:`readable` turns into one error.
    """
    order = _order(elf)
    entry = struct.Struct(f"{order}Q{_VERSION_ENTRY - 8}s")
    for number, (crc, name) in enumerate(entry.iter_unpack(_data(elf, "__versions"))):
        yield name.partition(b"\0")[0].decode(), crc, _offset(elf, "__versions") + number * entry.size
    crcs = [crc for (crc,) in struct.iter_unpack(f"{order}I", _data(elf, "__version_ext_crcs"))]
    names = _data(elf, "__version_ext_names").decode().split("\0")[:-1]
    for number, (name, crc) in enumerate(zip(names, crcs, strict=True)):
        yield name, crc, _offset(elf, "__version_ext_crcs") + number * 4


def _exports(elf: ELFFile, sections: list[str], symbols: list[_Symbol], module: str) -> Iterator[Export]:
    """Exported symbols: ``__ksymtab_<name>`` marks the entry of each, its section says who may import it."""
    by_name: dict[str, _Symbol] = {symbol.name: symbol for symbol in symbols if symbol.name.startswith("__kstrtabns_")}
    strings = _data(elf, "__ksymtab_strings")
    crcs: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for suffix in ("", "_gpl"):
        values: list[Any] = [crc for (crc,) in struct.iter_unpack(_order(elf) + "I", _data(elf, f"__kcrctab{suffix}"))]
        crcs[f"__ksymtab{suffix}"] = values
        sizes[f"__ksymtab{suffix}"] = len(_data(elf, f"__ksymtab{suffix}")) // max(1, len(values))
    for symbol in symbols:
        table = sections[symbol.section] if symbol.section < len(sections) else ""
        if not symbol.name.startswith("__ksymtab_") or table not in crcs:
            continue
        name = symbol.name.removeprefix("__ksymtab_")
        namespace = by_name.get(f"__kstrtabns_{name}")
        yield Export(
            name=name,
            crc=crcs[table][symbol.value // sizes[table]] if crcs[table] else None,
            module=module,
            gpl=table.endswith("_gpl"),
            namespace=_string(strings, namespace.value) if namespace else "",
        )


def providers(kernel: Mapping[str, Export], modules: Mapping[str, Module], name: str) -> dict[str, Export]:
    """Who lends what to a module: the kernel's exports, and those of its sibling modules."""
    lent = dict(kernel)
    for sibling, module in modules.items():
        if sibling != name:
            lent.update(module.exports)
    return lent


def imported(module: Module) -> Set[str]:
    """Every symbol that a module may get from elsewhere, weak ones included."""
    return module.imports | module.weak_imports
