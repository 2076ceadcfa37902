"""The kernel modules: whole, of this driver, for this kernel build, and such that the kernel will take them."""

from __future__ import annotations

import hashlib
import re
import stat

import pytest

from builds import kmod, paths
from builds.cache import read_digests
from builds.errors import InfrastructureError
from builds.kmod import LAYOUT_SYMBOL
from builds.model import MODULES, ModuleType
from builds.rootfs import Node

from .conftest import Compare
from .evidence import Expected, FactRef, Found, ModuleRef, TypeRef, kind_of

_LICENCES = {
    "nvidia": ("NVIDIA", "Dual MIT/GPL"),
    "nvidia-modeset": ("NVIDIA", "Dual MIT/GPL"),
    "nvidia-drm": ("MIT", "Dual MIT/GPL"),
    "nvidia-peermem": ("Linux-OpenIB", "Dual BSD/GPL"),
    "nvidia-uvm": ("Dual MIT/GPL", "Dual MIT/GPL"),
}
"""Licence that the vendor gives each module: proprietary, open."""


@pytest.mark.check("modules.present")
def test_present(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    node = found.rootfs.nodes.get(module.path)
    compare(kind_of(node), "a file")
    assert node
    compare(node.size > 0, True, "it is empty")


@pytest.mark.check("modules.types")
def test_types(module_type: TypeRef, found: Found, compare: Compare) -> None:
    """A type is there whole, or absent by a rule of the plan that the image repeats."""
    folder = module_type.path
    there = [node.path.removeprefix(f"{folder}/") for node in found.rootfs.below(folder)]
    reason = found.rootfs.nodes.get(f"{folder}.absent")
    planned = module_type.type in module_type.set.modules
    compare(
        {"modules": sorted(there), "absent": _text(reason)},
        {
            "modules": sorted(f"{name}.ko" for name in MODULES) if planned else [],
            "absent": None if planned else [f"{module_type.set.absent[module_type.type]}\n", "0o644"],
        },
    )


@pytest.mark.check("modules.kernel-build")
def test_kernel_build(fact: FactRef, found: Found, compare: Compare) -> None:
    """The files by which the installer finds the modules of the running kernel's build."""
    wanted: str = getattr(fact.set.kernel.build, fact.name)
    compare(_text(found.file(fact.path)), [f"{wanted}\n", "0o644"])


def _text(node: Node | None) -> list[str] | None:
    """Content and permissions of a file that the installer reads; None where there is none."""
    return [node.read().decode(errors="replace"), oct(stat.S_IMODE(node.mode))] if node else None


@pytest.mark.check("modules.unexpected")
def test_unexpected(found: Found, expected: Expected, compare: Compare) -> None:
    wanted = {module.path for module in expected.modules} | {fact.path for fact in expected.facts}
    wanted |= {f"{of.path}.absent" for of in expected.module_types if of.type in of.set.absent}
    there = {node.path for node in found.rootfs.below(paths.MODULES) if not node.is_dir}
    compare(sorted(there - wanted), [])


@pytest.mark.check("modules.vermagic")
def test_vermagic(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    if module.set.id not in expected.subject.vermagic:
        raise InfrastructureError("vermagic", "there is no module to compare with", got=expected.subject.missing)
    compare(found.module(module).one("vermagic"), expected.subject.vermagic[module.set.id])


@pytest.mark.check("modules.version")
def test_version(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    """It is the driver's; of a module whose sources declare none (nvidia-uvm before branch 535) there is none."""
    sources = expected.subject.tree / module.type.source_folder / module.name
    declared = any(_DECLARES_VERSION.search(path.read_bytes()) for path in sources.rglob("*.c"))
    compare(found.module(module).one("version"), expected.plan.cell.driver if declared else None)


_DECLARES_VERSION = re.compile(rb"^[ \t]*(?:MODULE_VERSION\(|MODULE_INFO\(version,)", re.MULTILINE)


@pytest.mark.check("modules.licence")
def test_licence(module: ModuleRef, found: Found, compare: Compare) -> None:
    proprietary, free = _LICENCES[module.name]
    wanted = free if module.type is ModuleType.OPEN else proprietary
    compare(found.module(module).info.get("license"), [wanted])


@pytest.mark.check("modules.source")
def test_source(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    """It was compiled from its own type's sources, as the paths in its messages show (nvidia-peermem has none).

    The licences alone do not tell one nvidia-uvm from the other. On a kernel without DRM nvidia-drm is an empty module,
    which need not have messages either (470's has none).
    """
    data = found.file(module.path).read()
    folders = {match.decode() for match in re.findall(rb"/src/(kernel[a-z-]*)/", data)}
    silent = module.name == "nvidia-peermem" or (
        module.name == "nvidia-drm" and not module.set.kernel.drm and not folders
    )
    compare(folders, set() if silent else {module.type.source_folder})


@pytest.mark.check("modules.bytes", required=False)
def test_bytes(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    """It is what was compiled by the plan, to the bit. Only where it was compiled can that be seen."""
    folder = expected.subject.modules.get(module.set.id, {}).get(module.type)
    if folder is None:
        pytest.skip("the modules of the plan were not compiled on this machine")
    data = found.file(module.path).read()
    wanted = read_digests(folder)[f"{module.name}.ko"]
    compare(hashlib.sha256(data).hexdigest(), wanted, "sha256: not the module that was compiled")


@pytest.mark.check("modules.build-paths")
def test_build_paths(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    """It names no source on the machine that compiled it: the same sources give the same bytes anywhere."""
    data = found.file(module.path).read()
    named = {match[0].decode() for match in _SOURCES.finditer(data)}
    compare(named | {path for path in expected.subject.private if path.encode() in data}, [])


_SOURCES = re.compile(rb"/(?:home|root|tmp|var/tmp|Users|workspace|github|runner)/[\x21-\x7e]+?\.[chSo]\b")


@pytest.mark.check("modules.name")
def test_name(module: ModuleRef, found: Found, compare: Compare) -> None:
    compare(found.module(module).one("name"), module.name.replace("-", "_"))


@pytest.mark.check("modules.machine")
def test_machine(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    compare(found.module(module).machine, expected.plan.cell.arch.elf_machine)


@pytest.mark.check("modules.stripped")
def test_stripped(module: ModuleRef, found: Found, compare: Compare) -> None:
    """Debug information multiplies the size of an image and serves nobody on a node."""
    sections = found.module(module).sections
    compare(sorted(name for name in sections if name.startswith((".debug_", ".rela.debug_"))), [])


@pytest.mark.check("modules.firmware")
def test_firmware(module: ModuleRef, found: Found, compare: Compare) -> None:
    """What a module asks the kernel for is where the installer points the kernel to; nvidia.ko cannot do without."""
    declared = found.module(module).info.get("firmware", ())
    if module.name == "nvidia":
        compare(bool(declared), True, "nvidia.ko declares no firmware")
    lacking = []
    for name in declared:
        node = found.rootfs.resolve(f"lib/firmware/{name}", paths.DRIVER_ROOT)
        if node is None or not node.is_file or not node.size:
            lacking.append(name)
    compare(lacking, [], "the driver root lacks declared firmware, or has it empty")


@pytest.mark.check("modules.imports")
def test_imports(module: ModuleRef, found: Found, compare: Compare) -> None:
    """Kernel or siblings export every symbol; a module that needs none has been damaged."""
    imports = found.module(module).imports
    compare(bool(imports), True, "it imports nothing")
    compare(sorted(imports - found.lent(module).keys()), [], "nobody exports these symbols")


@pytest.mark.check("modules.crcs")
def test_crcs(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    """The module was compiled against the very declarations that kernel and siblings export."""
    reads, lent = found.module(module), found.lent(module)
    if not module.set.kernel.build.modversions:
        compare(dict(reads.versions), {}, "the kernel has no CRCs to compare with")
        return
    known = {name: crc for name, crc in reads.versions.items() if name in lent}
    compare(bool(known), True, "it has no CRC of any exported symbol")
    compare(
        {name: f"{crc:#010x}" for name, crc in known.items() if crc != lent[name].crc},
        {},
        "these symbols are not the kernel's, or not the sibling's",
    )


@pytest.mark.check("modules.versions")
def test_versions(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    """Each import has a CRC. The kernel loads a module without any, with a taint: only reading finds that out."""
    reads = found.module(module)
    wanted = {*reads.imports, LAYOUT_SYMBOL} if module.set.kernel.build.modversions else set()
    compare(bool(wanted), module.set.kernel.build.modversions)
    compare(sorted(wanted - reads.versions.keys()), [], "no CRC")


@pytest.mark.check("modules.gpl-only")
def test_gpl_only(module: ModuleRef, found: Found, compare: Compare) -> None:
    """No module imports what its licence, or that of a sibling it imports from, forbids: it would never load."""
    reads, lent = found.module(module), found.lent(module)
    reason = kmod.tainted(found.siblings(module)).get(module.name)
    used = {name for name in kmod.imported(reads) if name in lent and lent[name].gpl}
    compare(sorted(used) if reason else [], [], f"GPL-only symbols; {reason}")


@pytest.mark.check("modules.namespaces")
def test_namespaces(module: ModuleRef, found: Found, compare: Compare) -> None:
    reads, lent = found.module(module), found.lent(module)
    compare(
        {
            name: lent[name].namespace
            for name in sorted(kmod.imported(reads) & lent.keys())
            if not kmod.admits(lent[name].namespace, reads, module.name)
        },
        {},
        "symbols of namespaces that it does not declare",
    )


@pytest.mark.check("modules.depends")
def test_depends(module: ModuleRef, found: Found, compare: Compare) -> None:
    """It names the modules that it imports from: by that the installer loads them first."""
    reads, lent = found.module(module), found.lent(module)
    lenders = {lent[name].module for name in kmod.imported(reads) & lent.keys()} - {"vmlinux"}
    named = {name for value in reads.info.get("depends", ()) for name in value.split(",") if name}
    compare({name.replace("-", "_") for name in named}, {name.replace("-", "_") for name in lenders})


@pytest.mark.check("modules.mode")
def test_mode(module: ModuleRef, found: Found, expected: Expected, compare: Compare) -> None:
    compare(oct(stat.S_IMODE(found.file(module.path).mode)), oct(0o644))
