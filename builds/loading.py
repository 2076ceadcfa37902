"""Loading: the modules of an image put into the very kernel that they are for, in a virtual machine, before any node.

The guest has a program of ours and no other (``guest/init.c``), and a module of ours (``guest/nvswitch.c``) that plays
the hardware without which the driver would not stay. Here is what the guest is given and what it is told to do; how
its answers are judged is a matter of the checks.

What the kernel refuses, and how, was seen on 6.1 to 6.12: kernel/module/main.c and kernel/module/version.c.
"""

from __future__ import annotations

import enum
import errno
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from . import compile as compiling
from . import kernel_image, kmod, machine
from .cache import Cache, disk_errors, key_of
from .console import Reporter
from .engine import Engine
from .errors import BuildError, InfrastructureError
from .kernel_image import KernelImage
from .machine import Boot
from .model import MODULES, Arch, ModuleType
from .plan import Inputs, ModuleSet, Plan

SOURCES = Path(__file__).parent / "guest"
GUEST_FILES = tuple(sorted(path for path in SOURCES.iterdir() if path.is_file()))

LOADED = MODULES[:4]
"""The modules that stay where there is no GPU; the fifth, nvidia-peermem, wants InfiniBand as well."""
PEERMEM = MODULES[4]
SPOILED = MODULES[1]
"""What the controls are made of: a module that is small, and imports from the kernel and from nvidia.ko."""

PATIENCE = 300.0
"""Seconds that a guest may take; it takes some ten."""

# The kernel's log comes with the answers; what it says in its last moments comes anyway, and begins with the time.
_KERNEL_LOG = "loglevel=1 printk.time=1"
_MIB = 1 << 20
_NO_GPU = "NVreg_RegistryDwords=RmAllowNoGpuInit=1"
"""What lets nvidia.ko stay without a GPU on branches that do not count an NVSwitch; the newer ones pass over it."""
_VERMAGIC, _FLAG = b"vermagic=", b" mod_unload "
_MARK = "@@ "


class Control(enum.StrEnum):
    """A module that is wrong on purpose: what the kernel says of it proves that the kernel looked."""

    FLAGS = "flags edited"
    CRC = "CRC flipped"
    TRUNCATED = "truncated"
    OTHER_KERNEL = "of another kernel"


REFUSALS = {
    Control.FLAGS: ("ENOEXEC", "version magic"),
    Control.CRC: ("EINVAL", "disagrees about version of symbol"),
    Control.TRUNCATED: ("ENOEXEC", ""),
    Control.OTHER_KERNEL: ("ENOEXEC", "version magic|disagrees about version of symbol module_layout"),
}
"""How a kernel refuses each, and what it says; in what words it does of a truncated file has changed over the years."""


@dataclass(frozen=True)
class Answer:
    """What came of one step of the guest's."""

    errno: int
    """0 for success, else the error of the system call."""
    kernel: tuple[str, ...]
    """What the kernel logged meanwhile."""
    text: tuple[str, ...]
    """Lines of the file that was to be read."""

    @property
    def error(self) -> str:
        """The error's name, such as ``ENOEXEC``; empty for success."""
        return errno.errorcode.get(self.errno, str(self.errno)) if self.errno else ""


@dataclass(frozen=True)
class Prepared:
    """What a virtual machine needs besides an image."""

    kernel: KernelImage
    guest: Path
    """Folder with the guest's program and its module."""


@dataclass(frozen=True)
class Step:
    """Something that the guest is told to do."""

    id: str
    """What its answer is called."""
    action: str
    """``load``, ``unload`` or ``read``."""
    argument: str

    def __str__(self) -> str:
        return f"{self.id} {self.action} {self.argument}"


@dataclass(frozen=True)
class Session:
    """What a guest is given, and what it is to do with it."""

    files: Mapping[str, bytes]
    """By their path in the guest."""
    steps: tuple[Step, ...]


def prepare(
    plan: Plan,
    of: ModuleSet,
    inputs: Inputs,
    place: Path | None,
    *,
    engine: Engine | None,
    cache: Cache,
    report: Reporter,
) -> Prepared:
    """What a virtual machine for a module set needs; ``place`` is where ``KERNEL_IMAGE`` has kernels.

    Raises ConfigurationError where ``place`` is a file of another kernel, any other HarnessError where something
    cannot be had: then nothing is said of the modules.
    """
    arch = plan.cell.arch
    machine.require(arch)
    kernel = kernel_image.find(of, arch, inputs, place, engine=engine, cache=cache, report=report)
    return Prepared(kernel, guest(plan, of, inputs, engine=engine, cache=cache, report=report))


def guest(plan: Plan, of: ModuleSet, inputs: Inputs, *, engine: Engine | None, cache: Cache, report: Reporter) -> Path:
    """Folder with the guest's program and its module, compiled once per kernel build and compiler.

    Raises InfrastructureError without an engine that can, BuildError where they do not compile.
    """
    sources = {path.name: path.read_text() for path in GUEST_FILES}

    def build(folder: Path) -> None:
        if engine is None:
            raise InfrastructureError("virtual machine's guest", "compiling it needs a container engine")
        way = compiling.way(of, inputs, engine)
        with report.step("compile guest") as step:
            compiling.small(plan, of, inputs, sources, folder, engine=engine, report=report)
            step.note(f"{of.kernel.build.release} ({of.kernel.build.package}), {way}")

    key = key_of(kernel=asdict(of.kernel.build), output=of.kernel.output, compiler=of.kernel.compiler, sources=sources)
    return cache.make("guest", key, build)[0]


def session(
    modules: Mapping[ModuleType, Mapping[str, bytes]],
    guests: Path,
    kernels: Sequence[tuple[str, bytes]],
    *,
    modversions: bool,
) -> Session:
    """What to do with the modules of an image, by type and name: load them in order, ask for the version, unload them.

    ``kernels`` are the kernel's own modules that they need. The controls come when nvidia.ko of the first type is
    loaded: they are made of its nvidia-uvm, whose needs are met then, so that only what was changed can be at fault.
    What a damaged image lacks is left out: it gets no answer.
    """
    files = {"init": (guests / "init").read_bytes(), "nvswitch.ko": (guests / "nvswitch.ko").read_bytes()}
    steps = [Step("kernel", "read", "/proc/version"), Step("nvswitch", "load", "/nvswitch.ko")]
    for name, data in kernels:
        files[f"kernel/{name}.ko"] = data
        steps.append(Step(f"kernel/{name}", "load", f"/kernel/{name}.ko"))
    for number, (kind, of) in enumerate(sorted(modules.items())):
        files |= {f"{kind}/{name}.ko": data for name, data in of.items()}
        loads = [
            Step(f"load/{kind}/{name}", "load", f"/{kind}/{name}.ko{' ' + _NO_GPU if name == LOADED[0] else ''}")
            for name in MODULES
            if name in of
        ]
        if number == 0 and SPOILED in of:
            wrong = controls(of[SPOILED], modversions=modversions)
            files |= {f"{control.name}.ko": data for control, data in wrong.items()}
            loads[1:1] = [Step(f"control/{control.name}", "load", f"/{control.name}.ko") for control in wrong]
        steps += loads
        steps.append(Step(f"version/{kind}", "read", "/proc/driver/nvidia/version"))
        steps.append(Step(f"taint/{kind}", "read", "/proc/sys/kernel/tainted"))
        names = (PEERMEM, *reversed(LOADED))
        steps += [Step(f"unload/{kind}/{name}", "unload", name.replace("-", "_")) for name in names]
    return Session(files, tuple(steps))


def boot(
    arch: Arch, vmlinuz: Path, what: Session, folder: Path, log: Path, patience: float = PATIENCE
) -> dict[str, Answer]:
    """Boot a kernel with a session and give the answers, by step; ``folder`` is for the initial file system.

    Raises InfrastructureError where the machine does not run or not end, or the guest does not get as far as its first
    step: that proves nothing of the modules. Where it ends later, the steps that it did not come to have no answer.
    """
    archive = folder / "initrd"
    with disk_errors("initial file system", folder):
        size = write_initrd(archive, what)
    # Twice its size while it is unpacked, then the modules once more as they are loaded.
    memory = 512 + 3 * size // _MIB
    try:
        ended = machine.run(arch, Boot(vmlinuz, archive, _KERNEL_LOG, memory), log, patience=patience)
    finally:
        archive.unlink()
    answers = read(ended.console, what.steps)
    if not answers or not ended.in_time:
        raise InfrastructureError(
            "virtual machine",
            "its kernel did not start our program" if ended.in_time else f"did not end in {patience:.0f} s",
            got=_last_words(ended.console),
            hint=f"its console: {log}",
        )
    return answers


def _last_words(console: str) -> str:
    """What a machine said in the end; of a panic its first line, which says why."""
    lines = [line for line in console.split("\n") if line.strip()]
    why = [line for line in lines if "Kernel panic" in line]
    return (why or lines or ["no word"])[-1][:300]


def read(console: str, steps: Sequence[Step]) -> dict[str, Answer]:
    """The answers on a console, by step; what it says besides, and lines that are not whole, are passed over.

    An answer is the guest's own word: its line begins with the mark, where the kernel has the time, and ends where the
    guest ended it. Raises InfrastructureError where the answers are not those to the steps, one by one.
    """
    answers: dict[str, Answer] = {}
    told: dict[tuple[str, str], list[str]] = {}
    order = iter(steps)
    for line in console.split("\n"):
        if not line.startswith(_MARK):
            continue
        step, _, rest = line.removeprefix(_MARK).partition(" ")
        what, _, words = rest.partition(" ")
        if what == "status" and re.fullmatch("[0-9]+", words):
            asked = next(order, None)
            if asked is None or asked.id != step:
                raise InfrastructureError(
                    "virtual machine",
                    f"answers {step}" if asked is None else f"answers {step} instead of {asked.id}",
                    got=line,
                )
            kernel, text = (tuple(told.get((step, part), ())) for part in ("kernel", "text"))
            answers[step] = Answer(int(words), kernel, text)
        elif words.strip():
            told.setdefault((step, what), []).append(words.strip())
    return answers


def controls(data: bytes, *, modversions: bool) -> dict[Control, bytes]:
    """A module made wrong in each way that the kernel must find by itself, as far as there is something to make wrong.

    Without MODVERSIONS no CRC is compared: then there is none to flip.
    """
    at = data.find(_VERMAGIC) + len(_VERMAGIC)
    flag = data.find(_FLAG, at)
    found = {Control.TRUNCATED: data[: len(data) // 2]}
    if flag >= at >= len(_VERMAGIC):
        found[Control.FLAGS] = _flip(data, [flag + 1])
        found[Control.OTHER_KERNEL] = _flip(data, [at, *(place for _, place in _crcs(data))])
    if modversions and (own := [place for name, place in _crcs(data) if name != kmod.LAYOUT_SYMBOL]):
        found[Control.CRC] = _flip(data, own[:1])
    return found


def _flip(data: bytes, places: Iterable[int]) -> bytes:
    """Bytes with a bit changed in some places."""
    edited = bytearray(data)
    for place in places:
        if place < len(data):  # a damaged file may tell of bytes that it has not
            edited[place] ^= 1
    return bytes(edited)


def _crcs(data: bytes) -> list[tuple[str, int]]:
    """Each symbol that a module imports by CRC, and where in the file that is; nothing where it cannot be read."""
    with suppress(BuildError), kmod.readable("module"):
        return [(name, place) for name, _, place in kmod.version_entries(ELFFile(io.BytesIO(data)))]
    return []


def write_initrd(target: Path, what: Session) -> int:
    """Write the guest's file system, a cpio archive as the kernel unpacks it (``newc``); its size in bytes."""
    script = "".join(f"{step}\n" for step in what.steps).encode()
    files = {**what.files, "script": script}
    folders = sorted({str(parent) for path in files for parent in Path(path).parents} - {"."})
    with target.open("wb") as archive:
        number = 0

        def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
            nonlocal number
            number += 1
            path = name.encode() + b"\0"
            fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
            archive.write(b"070701" + b"".join(b"%08X" % field for field in fields) + path)
            archive.write(bytes(-(6 + 8 * len(fields) + len(path)) % 4) + data + bytes(-len(data) % 4))

        for folder in ("dev", "proc", "sys", *folders):
            add(folder, 0o040755)
        add("dev/console", 0o020600, device=(5, 1))
        add("dev/kmsg", 0o020600, device=(1, 11))
        for name, data in files.items():
            add(name, 0o100755, data)
        add("TRAILER!!!", 0)
        return archive.tell()
