"""Whether programs of another architecture run: found out by running one, the smallest there is.

What a kernel is told of interpreters (``binfmt_misc``), by whom and under which name, differs; whether it works inside
a container, which has no interpreter of its own, is known when it did.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from pathlib import Path

from .model import Arch

_BASE = 0x400000
_HEADER = 64
_SEGMENT = 56
_MACHINE = {Arch.AMD64: 62, Arch.ARM64: 183}  # e_machine
_EXIT = {
    Arch.AMD64: bytes.fromhex("31ff b83c000000 0f05"),  # xor edi,edi; mov eax,60; syscall
    Arch.ARM64: bytes.fromhex("000080d2 a80b80d2 010000d4"),  # mov x0,#0; mov x8,#93; svc #0
}
"""The system call that ends a process with status 0."""


def program(arch: Arch) -> bytes:
    """A static ELF program that ends with status 0 and needs nothing: no library, no loader, no file."""
    code = _EXIT[arch]
    size = _HEADER + _SEGMENT + len(code)
    entry = _BASE + _HEADER + _SEGMENT
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bits, little-endian
    header = struct.pack(
        "<HHIQQQIHHHHHH", 2, _MACHINE[arch], 1, entry, _HEADER, 0, 0, _HEADER, _SEGMENT, 1, _HEADER, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)  # loaded, read and executed
    return identity + header + segment + code


def host_runs(arch: Arch) -> bool:
    """Whether this machine runs programs of an architecture in a root of its own, where no interpreter lies.

    Nobody but root may change the root: for others it is tried without.
    """
    if os.uname().machine == arch.machine:
        return True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program"
        path.write_bytes(program(arch))
        path.chmod(0o755)
        command = ["chroot", folder, "/program"] if os.geteuid() == 0 else [str(path)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except OSError:  # the kernel knows no interpreter for it
            return False
    return done.returncode == 0


def hint(arch: Arch) -> str:
    """What makes programs of an architecture run here."""
    return f"`nox -s setup -- --arch {arch}` installs and registers an emulator, where the engine runs on this machine"
