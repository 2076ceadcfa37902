"""A virtual machine: a kernel that QEMU boots, and what it says on its console.

Plain emulation, one processor: the same on every machine, whichever architecture that has, and whether or not it is
itself a virtual one.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import InfrastructureError
from .model import Arch

PROGRAMS = {Arch.AMD64: "qemu-system-x86_64", Arch.ARM64: "qemu-system-aarch64"}
"""QEMU, by the architecture of the machine that it plays."""

_HARDWARE = {
    Arch.AMD64: ("-M", "q35", "-cpu", "max"),
    Arch.ARM64: ("-M", "virt,gic-version=3", "-cpu", "cortex-a57"),
}
_CONSOLE = {
    # An emulated timer is now and then too late for the kernel's test of it, which then panics.
    Arch.AMD64: "console=ttyS0 no_timer_check",
    Arch.ARM64: "console=ttyAMA0",
}
_TAIL = 3  # lines of a console that an error shows


@dataclass(frozen=True)
class Boot:
    """What a machine boots, and what it has."""

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    """More of the kernel's command line."""
    memory: int = 1024
    """MiB."""
    drives: tuple[Path, ...] = ()
    """Raw disk images, written to; the guest has them as ``/dev/nvme0n1``, ``/dev/nvme1n1`` …"""


@dataclass(frozen=True)
class Ended:
    """How a machine ended."""

    console: str
    """All that it said."""
    seconds: float
    in_time: bool
    """Whether it ended by itself: it was switched off, or its kernel panicked."""


def program(arch: Arch) -> str | None:
    """Path of the QEMU that plays an architecture, if this machine has it."""
    return shutil.which(PROGRAMS[arch])


def version(arch: Arch) -> str:
    """Version of that QEMU. Raises InfrastructureError where there is none."""
    said = subprocess.run([require(arch), "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition("version ")[2].split(" ")[0].strip() or "unknown"


def command(arch: Arch, boot: Boot, qemu: str) -> tuple[str, ...]:
    """The command that runs a machine with its console on standard output."""
    drives = [
        option
        for number, path in enumerate(boot.drives)
        for option in (
            *("-drive", f"file={str(path).replace(',', ',,')},format=raw,if=none,id=drive{number}"),
            *("-device", f"nvme,drive=drive{number},serial=drive{number}"),
        )
    ]
    return (
        *("setpriv", "--pdeathsig", "KILL", "--", qemu),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-accel", "tcg", "-smp", "1", "-m", str(boot.memory), *_HARDWARE[arch]),
        *("-kernel", str(boot.kernel), *(("-initrd", str(boot.initrd)) if boot.initrd else ())),
        *("-append", f"{_CONSOLE[arch]} panic=-1 {boot.append}".rstrip()),
        *drives,
    )


def run(
    arch: Arch, boot: Boot, log: Path, *, patience: float, on_line: Callable[[str], None] = lambda _line: None
) -> Ended:
    """Run a machine until it ends, or is ended after ``patience`` seconds; its console goes to ``log`` as well.

    ``on_line`` is told each line as it comes. The machine dies with the thread that called.
    Raises InfrastructureError where there is no QEMU, or it does not run.
    """
    words = command(arch, boot, require(arch))
    log.parent.mkdir(parents=True, exist_ok=True)
    began, late, lines = time.monotonic(), threading.Event(), []
    try:
        started = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise InfrastructureError("virtual machine", f"{words[0]} does not start", got=str(error)) from error
    with started as process, log.open("w", encoding="utf-8") as file:
        assert process.stdout

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(patience, end)
        timer.daemon = True
        timer.start()
        try:
            for data in process.stdout:
                line = data.decode(errors="replace").rstrip("\r\n")
                file.write(f"{line}\n")
                file.flush()
                lines.append(line)
                on_line(line)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    if process.returncode and not late.is_set():
        raise InfrastructureError(
            PROGRAMS[arch],
            f"ended with status {process.returncode}",
            got="; ".join(line for line in lines[-_TAIL:] if line.strip()) or "no word",
            hint=f"all it said is in {log}",
        )
    return Ended("\n".join(lines), time.monotonic() - began, not late.is_set())


def require(arch: Arch) -> str:
    """Path of that QEMU. Raises InfrastructureError, with what installs it, where there is none."""
    found = program(arch)
    if found is None:
        raise InfrastructureError(
            "virtual machine",
            f"this machine has no {PROGRAMS[arch]}",
            hint="`nox -s setup` installs it" + ("" if arch is Arch.AMD64 else f", with TARGET_ARCH={arch}"),
        )
    return found
