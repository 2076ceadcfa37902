"""The driver root: what a node sees at /run/nvidia/driver, file by file as the driver package has it."""

from __future__ import annotations

import hashlib
import json
import posixpath
import stat
from fnmatch import fnmatchcase

import pytest

from builds import kmod, paths
from builds.components import Component
from builds.manifest import Placed
from builds.rootfs import Node

from .conftest import Compare
from .evidence import Expected, Found, kind_of, may_lack

_ROOT = paths.DRIVER_ROOT


@pytest.mark.check("driver-root.files")
def test_files(file: Placed, found: Found, compare: Compare) -> None:
    node = found.rootfs.nodes.get(f"{_ROOT}/{file.dest}")
    compare(kind_of(node), "a file")
    assert node
    compare(oct(stat.S_IMODE(node.mode)), oct(file.mode))


@pytest.mark.check("driver-root.bytes")
def test_bytes(file: Placed, found: Found, expected: Expected, compare: Compare) -> None:
    with expected.source(file).open("rb") as stream:
        wanted = hashlib.file_digest(stream, "sha256").hexdigest()
    compare(
        hashlib.sha256(found.file(f"{_ROOT}/{file.dest}").read()).hexdigest(),
        wanted,
        "sha256: not the driver package's file",
    )


@pytest.mark.check("driver-root.links")
def test_links(link: Placed, found: Found, compare: Compare) -> None:
    """Links stay links, and lead to a file of the driver root, inside it."""
    node = found.rootfs.nodes.get(f"{_ROOT}/{link.dest}")
    compare(kind_of(node), "a link")
    assert node
    compare(node.target, link.target)
    compare(kind_of(found.rootfs.resolve(link.dest, _ROOT)), "a file", "the link leads nowhere")


@pytest.mark.check("driver-root.unexpected")
def test_unexpected(found: Found, expected: Expected, compare: Compare) -> None:
    wanted = {one.dest for one in expected.placed}
    folders = {str(parent) for dest in wanted for parent in _parents(dest)}
    extra = [
        f"{kind_of(node)} {_inside(node)}"
        for node in found.rootfs.below(_ROOT)
        if (_inside(node) not in folders if node.is_dir else _inside(node) not in wanted)
    ]
    compare(extra, [])


@pytest.mark.check("driver-root.soname")
def test_soname(library: Placed, found: Found, expected: Expected, compare: Compare) -> None:
    """A library is found under the name that programs ask for: the driver's own, of its version."""
    soname = expected.elf(library).soname
    node = found.rootfs.resolve(f"{posixpath.dirname(library.dest)}/{soname}", _ROOT)
    compare(_inside(node) if node else None, library.dest)


@pytest.mark.check("driver-root.machine")
def test_machine(elf: Placed, found: Found, expected: Expected, compare: Compare) -> None:
    compare(found.elf(f"{_ROOT}/{elf.dest}").machine, expected.plan.cell.arch.elf_machine)


@pytest.mark.check("driver-root.needed")
def test_needed(elf: Placed, found: Found, expected: Expected, compare: Compare) -> None:
    """Everything it asks the loader for is in the driver root or in the userland, or absent for a reason."""
    name, lacking = posixpath.basename(elf.dest), []
    for needed in found.elf(f"{_ROOT}/{elf.dest}").needed:
        if needed not in may_lack(name) and not _loadable(needed, found, expected):
            lacking.append(needed)
    compare(lacking, [], "needed libraries that are nowhere")


@pytest.mark.check("driver-root.components")
def test_components(component: Component, found: Found, expected: Expected, compare: Compare) -> None:
    """What there is a source for is there; what is absent is absent by rule, with the reason, and not by chance."""
    main, name = component.main.format(triplet=expected.plan.cell.arch.triplet), component.name
    reason = expected.plan.components_absent.get(name, "")
    planned = name in expected.plan.components
    compare({"unpacked": name in expected.subject.components, "reason": bool(reason)}, _sides(planned))
    files = sorted(_inside(node) for node in found.rootfs.below(_ROOT) if node.is_file)
    compare(
        {"files": [path for path in files if fnmatchcase(path, main)], "absent by rule": reason},
        {
            "files": sorted(
                one.dest for one in expected.files if one.component == name and fnmatchcase(one.dest, main)
            ),
            "absent by rule": reason,
        },
    )


def _sides(planned: bool) -> dict[str, bool]:
    return {"unpacked": planned, "reason": not planned}


@pytest.mark.check("driver-root.licences")
@pytest.mark.parametrize("path", ["LICENSE", "supported-gpus/LICENSE"])
def test_licences(path: str, found: Found, compare: Compare) -> None:
    compare(found.file(f"{_ROOT}/usr/share/nvidia/{path}").size > 0, True, "it is empty")


@pytest.mark.check("driver-root.supported-gpus")
def test_supported_gpus(found: Found, compare: Compare) -> None:
    """The data by which the installer chooses the module type can be read and knows GPUs."""
    data = found.file(f"{_ROOT}/usr/share/nvidia/supported-gpus/supported-gpus.json").read()
    try:
        chips = json.loads(data)["chips"]
        known = bool(chips) and all("devid" in chip and "features" in chip for chip in chips)
    except (ValueError, KeyError, TypeError):
        known = False
    compare(known, True, "no chips with id and features")


@pytest.mark.check("driver-root.toolkit")
@pytest.mark.parametrize("name", ["libnvidia-ml.so.1", "libcuda.so.1", "nvidia-smi", "nvidia-modprobe"])
def test_toolkit(name: str, found: Found, expected: Expected, compare: Compare) -> None:
    """Found where the container toolkit looks (operator contract, row 14), of the driver's version and machine."""
    triplet = expected.plan.cell.arch.triplet
    libraries = ("", "usr/lib64", "lib64", f"usr/lib/{triplet}", f"lib/{triplet}")
    folders = libraries if ".so" in name else ("", "usr/bin", "usr/sbin", "bin", "sbin")
    nodes = [found.rootfs.resolve(f"{folder}/{name}", _ROOT) for folder in folders]
    first = next((node for node in nodes if node and node.is_file), None)
    wanted = name.replace(".so.1", f".so.{expected.plan.cell.driver}")
    compare(posixpath.basename(first.path) if first else None, wanted)
    assert first
    compare(found.elf(first.path).machine, expected.plan.cell.arch.elf_machine)
    compare(first.mode & 0o111, 0o111)


@pytest.mark.check("driver-root.dev")
def test_dev(found: Found, compare: Compare) -> None:
    """With a dev/ the container toolkit takes device nodes from the driver root instead of the host."""
    compare(kind_of(found.rootfs.nodes.get(f"{_ROOT}/dev")), "nothing")


@pytest.mark.check("driver-root.special")
def test_special(found: Found, compare: Compare) -> None:
    """Nothing in it but files, folders and links."""
    nodes = list(found.rootfs.below(_ROOT))
    compare(bool(nodes), True, "it is empty")
    compare([node.path for node in nodes if kind_of(node) == "a special file"], [])


@pytest.mark.check("driver-root.shadowed")
def test_shadowed(found: Found, compare: Compare) -> None:
    """Nothing of ours in /lib/firmware: the node's driver root is mounted over it (operator contract, row 12)."""
    compare([node.path for node in found.ours() if node.path.startswith(("lib/firmware/", "usr/lib/firmware/"))], [])


def _inside(node: Node) -> str:
    return node.path.removeprefix(f"{_ROOT}/")


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _loadable(name: str, found: Found, expected: Expected) -> bool:
    """Whether the loader finds a library of the right machine by its name."""
    arch = expected.plan.cell.arch
    folders = (f"{_ROOT}/usr/lib/{arch.triplet}", f"usr/lib/{arch.triplet}", f"lib/{arch.triplet}", "usr/lib", "lib64")
    for folder in folders:
        node = found.rootfs.resolve(f"{folder}/{name}")
        if node and node.is_file and kmod.is_elf(node.read()):
            return found.elf(node.path).machine == arch.elf_machine
    return False
