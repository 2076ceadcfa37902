"""A virtual machine as a node: a small Debian with the cell's kernel, an OCI runtime, and the image in it.

The node's disk is made of three parts: the operating system (made once by mmdebstrap, as the lab's images are, and
kept in the cache), the image's layers as a runtime would unpack them, and what the node is told to do. The containers
are run from an overlay on the image, so that each begins with the image as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builds import kernel_image, kmod, loading, machine, oci, paths
from builds.cache import Cache, key_of, locked, recipe, scratch
from builds.console import Reporter
from builds.errors import InfrastructureError
from builds.kernel_image import KernelImage
from builds.lab import commands, images, recipes
from builds.lab.apt import Archive
from builds.lab.images import Contents
from builds.loading import Session
from builds.machine import Boot
from builds.model import Arch
from builds.rootfs import RootFs, open_rootfs

from . import pods

GUEST = Path(__file__).parent / "guest"
IMAGE = "image"
LAYERS = "layers"

_RELEASE = "debian12"  # of the node's programs; its kernel is the cell's
_PROGRAMS = ("busybox-static", "crun", "kmod", "mount", "procps", "iproute2")
_TO_BOOT = ("nvme", "crc32c_generic", "ext4")  # of which the last asks for the second, but not by name
_TO_RUN = ("overlay",)
_MEMORY = 3072  # MiB: the classic way unpacks archives into it
_PATIENCE = 900.0  # seconds for all steps; they take some 60
_SLACK = 512 << 20  # bytes of the disk for what containers write, and what the file system takes itself
_MARK = "@@ "


@dataclass(frozen=True)
class Step:
    """Something that the node is told to do: a function of ``guest/pods.sh`` with its arguments."""

    id: str
    words: str

    def __str__(self) -> str:
        return f"{self.id} {self.words}"


@dataclass(frozen=True)
class Said:
    """What came of a step."""

    status: int
    seconds: float
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def words(self, kind: str) -> list[str]:
        """What the lines of a kind say, sorted: ``pods.sh`` has the kinds."""
        return sorted(rest for head, _, rest in (line.partition(" ") for line in self.lines) if head == kind)


@dataclass(frozen=True)
class Machine:
    """What a node is made of, besides what it is told to do."""

    image: oci.Image
    kernel: KernelImage
    release: str
    """The kernel's name, ``uname -r``."""
    guest: Path
    """Folder with the module that plays an NVSwitch."""
    arch: Arch
    log: Path
    """Where its console goes."""


@dataclass(frozen=True)
class Orders:
    """What a node is told to do."""

    steps: tuple[Step, ...]
    pods: Mapping[str, Mapping[str, Any]]
    """The runtime's configuration of each pod."""
    layers: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Files that lie on top of the image's, by layer and path."""
    archives: Mapping[str, Iterable[tuple[str, str]]] = field(default_factory=dict)
    """What the classic way unpacks: folders and files of the image in each archive, with their path in it."""


def run(of: Machine, orders: Orders, cache: Cache, report: Reporter) -> dict[str, Said]:
    """Boot a node, have it carry out its orders, and give what came of each step, by its id.

    Raises InfrastructureError where this machine lacks a command, or the node does not come to its last step: then
    nothing is said of the image.
    """
    commands.require(("mkfs.ext4", machine.PROGRAMS[of.arch]))
    system = _system(of.arch, cache, report)
    with scratch(cache.root / "tmp") as folder:
        root, disk, initrd = folder / "root", folder / "node.img", folder / "initrd"
        with (
            report.step("node's disk") as step,
            open_rootfs(system, folder) as files,
            open_rootfs(of.image, folder) as ours,
        ):
            unpack(files, root)
            unpack(ours, root / IMAGE)
            _furnish(root, of, orders, ours)
            size = _write_disk(root, disk)
            needed = of.kernel.closure(_TO_BOOT)
            loading.write_initrd(initrd, _initial(files, needed))
            shutil.rmtree(root)
            step.note(f"{size >> 20} MiB")
        boot = Boot(of.kernel.vmlinuz, initrd, "loglevel=4", _MEMORY, (disk,))

        def tell(line: str) -> None:
            id_, what, rest = _parts(line)
            if what == "status":
                status, _, hundredths = rest.partition(" ")
                report.say(f"  {id_}: {int(hundredths) / 100:.1f} s" + ("" if status == "0" else f", status {status}"))

        with report.step("node") as step:
            ended = machine.run(of.arch, boot, of.log, patience=_PATIENCE, on_line=tell)
            step.note("switched off" if ended.in_time else "ended by us")
    said = read(ended.console)
    if said.get("boot", Said(0, 0.0)).status:
        raise InfrastructureError("node", "did not start", got=str(said["boot"]), hint=f"its console: {of.log}")
    if lacking := [one.id for one in (Step("boot", ""), *orders.steps) if one.id not in said]:
        raise InfrastructureError(
            "node", f"did not come to its step {lacking[0]}", got=ended.console[-500:], hint=f"its console: {of.log}"
        )
    return said


def read(console: str) -> dict[str, Said]:
    """What a console says came of each step."""
    said: dict[str, Said] = {}
    lines: dict[str, list[str]] = {}
    for line in console.splitlines():
        id_, what, rest = _parts(line)
        if what == "text":
            lines.setdefault(id_, []).append(rest)
        elif what == "status":
            status, _, hundredths = rest.partition(" ")
            said[id_] = Said(int(status), int(hundredths) / 100, tuple(lines.pop(id_, ())))
    return said


def _parts(line: str) -> tuple[str, str, str]:
    """Id, kind and rest of a line of a node's; empty for what others say."""
    if not line.startswith(_MARK):
        return "", "", ""
    id_, _, rest = line.removeprefix(_MARK).partition(" ")
    what, _, rest = rest.partition(" ")
    return id_, what, rest


def _system(arch: Arch, cache: Cache, report: Reporter) -> oci.Image:
    """The node's operating system, as an image. Debian's archive is asked for it once."""
    base = recipes.image("base", _RELEASE, arch)
    of = replace(base, packages=tuple(dict.fromkeys((*base.packages, *_PROGRAMS))))

    def build(folder: Path) -> None:
        archive = Archive(cache.root / "node" / "apt", of.suites, arch, of.components)
        with report.step("node's operating system"), locked(cache.root / "lab" / "make"):
            archive.update()
            packages = archive.closure(of.packages)
            pool = cache.root / "lab" / "pool"
            archive.download(packages, pool, lambda _bytes: None)
            log = cache.root / "lab" / "logs" / f"node-{arch}.log"
            images.build(of, Contents(packages, of.packages), pool, folder, log, lambda _packages: None)
            images.add(folder, of, folder / "layout", "node")

    key = key_of(packages=of.packages, suite=of.suite, arch=arch, code=recipe(Path(images.__file__)))
    return oci.find_image(cache.make("node", key, build)[0] / "layout", "node", arch)


def unpack(files: RootFs, target: Path) -> None:
    """Unpack an image's file system, with owners, modes and times."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(files.nodes):
        node, place = files.nodes[path], target / path
        if node.is_dir:
            place.mkdir(exist_ok=True)
        elif node.is_link:
            place.symlink_to(node.target)
        elif node.is_file:
            place.write_bytes(node.read())
        else:
            continue  # a runtime makes device nodes itself
        os.chown(place, node.uid, node.gid, follow_symlinks=False)
        if not node.is_link:
            place.chmod(node.mode & 0o7777)
        os.utime(place, (node.mtime, node.mtime), follow_symlinks=False)


def _furnish(root: Path, of: Machine, orders: Orders, image: RootFs) -> None:
    """Put onto the node's disk what makes it this node, and what it is told to do."""
    for name in ("sys", "proc", "dev", "run", "var/lib/crun", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    home = root / "node"
    shutil.copytree(GUEST, home)
    (home / "init").chmod(0o755)
    (home / "nvidia-smi").chmod(0o755)
    shutil.copy(of.guest / "nvswitch.ko", home)
    (home / "drivers").mkdir()
    (home / "drivers" / "nvidia.conf").write_text(f"# as the operator mounts it\n{pods.PARAMETER}\n")
    (home / "steps").write_text("".join(f"{step}\n" for step in orders.steps))
    modules = root / "lib" / "modules" / of.release
    modules.mkdir(parents=True)
    wanted = {name for module in _modules(image) for name in kernel_image.depends(module)}
    for name, data in of.kernel.closure([*_TO_RUN, *sorted(wanted)]):
        (modules / f"{name}.ko").write_bytes(data)
    for listing in of.kernel.modules.glob("modules.*"):
        shutil.copy(listing, modules)
    for pod, spec in orders.pods.items():
        (root / "pods" / pod).mkdir(parents=True)
        (root / "pods" / pod / "config.json").write_text(json.dumps(spec))
    for layer, files in orders.layers.items():
        for path, data in files.items():
            place = root / LAYERS / layer / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            place.chmod(0o755)
    (home / "classic").mkdir()
    for name, content in orders.archives.items():
        with tarfile.open(home / "classic" / f"{name}.tar.gz", "w:gz", compresslevel=1) as archive:
            for source, path in content:
                archive.add(root / IMAGE / source, path)


def _modules(image: RootFs) -> list[kmod.Module]:
    """The image's modules."""
    nodes = [node for node in image.below(paths.MODULES) if node.path.endswith(".ko")]
    return [kmod.read_module(node.path, node.read()) for node in nodes]


def _write_disk(root: Path, disk: Path) -> int:
    """Make a file system of a folder, without mounting anything; its size in bytes."""
    used = sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))
    size = used + used // 16 + _SLACK
    with disk.open("wb") as file:
        file.truncate(size)
    made = subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", "-d", str(root), str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise InfrastructureError("node's disk", f"mkfs.ext4 ended with status {made.returncode}", got=made.stderr)
    return size


def _initial(files: RootFs, needed: Sequence[tuple[str, bytes]]) -> Session:
    """The initial file system: busybox, and the modules without which the disk cannot be found."""
    return Session(
        {
            "init": (GUEST / "initrd.sh").read_bytes(),
            "bin/busybox": files.read("bin/busybox"),
            "order": "".join(f"{name}\n" for name, _ in needed).encode(),
            **{f"modules/{name}.ko": data for name, data in needed},
        },
        (),
    )
