"""Writes a driver package: a driver tree's ``.manifest``, and the ``.run`` file around the tree.

A ``.run`` file is a shell script with an archive behind it. Line 2 has the POSIX cksum, line 3 the MD5, of all
that follows line 3; ``skip`` is the number of the line where the archive starts.
"""

from __future__ import annotations

import hashlib
import stat
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard
from fastcrc import crc32

from ..cache import CHUNK
from ..model import MODULES, Arch
from ..oci import EPOCH

_LEVEL, _THREADS = 9, 2
COMPRESSOR = f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))} level {_LEVEL} threads {_THREADS}"
"""What a package's bytes depend on, besides its content."""

_TITLE = "NVIDIA Accelerated Graphics Driver for Linux-{machine}"


@dataclass(frozen=True)
class Line:
    """One entry of a manifest: a file of the tree, or a link that the vendor's installer makes."""

    path: str
    mode: int
    """Permissions with the setuid bit; 0 for a link."""
    type: str
    module: str
    fields: str = ""
    target: str = ""

    def __str__(self) -> str:
        parts = (self.path, f"{self.mode:04o}" if self.mode < 0o1000 else f"{self.mode:05o}", self.type)
        rest = (self.fields, self.target, f"MODULE:{self.module}")
        return " ".join((*parts, *(part for part in rest if part)))


def manifest(version: str, arch: Arch, lines: Iterable[Line]) -> str:
    """The text of a package's manifest: eight lines about the package, its entries, an empty line."""
    head = (
        _TITLE.format(machine=arch.machine),
        version,
        "nv-kernel-interface",  # ignored by every reader
        " ".join(MODULES),
        "resman",
        "none",
        "./kernel/",
        "./kernel/precompiled/",
    )
    entries = [str(line) for line in sorted(lines, key=lambda line: (line.path, line.type))]
    return "\n".join((*head, *entries, "", ""))


def posix_cksum(stream_pieces: Iterable[bytes]) -> int:
    """What ``cksum`` prints first: a CRC-32 over the bytes and, behind them, their number."""
    return _Checksums.of(stream_pieces).cksum


def write(
    tree: Path, version: str, arch: Arch, lines: Sequence[Line], target: Path, progress: Callable[[int], None]
) -> None:
    """Write the package of a driver tree to ``target``. The same tree gives the same bytes on every machine.

    ``lines`` is what the manifest has, and gives each file its permissions. ``progress`` is told bytes of content.
    The caller renames the folder of ``target`` into place.
    """
    (tree / ".manifest").write_text(manifest(version, arch, lines))
    payload = target.with_name(target.name + ".payload")
    modes = {line.path: line.mode & 0o777 for line in lines if line.mode}
    _pack(tree, modes, payload, progress)
    covered = script(version, arch).encode()
    with payload.open("rb") as stream:
        sums = _Checksums()
        sums.add(covered)
        while chunk := stream.read(CHUNK):
            sums.add(chunk)
        stream.seek(0)
        with target.open("wb") as file:
            file.write(f"#! /bin/sh\nCRCsum={sums.cksum}\nMD5={sums.md5.hexdigest()}\n".encode())
            file.write(covered)
            while chunk := stream.read(CHUNK):
                file.write(chunk)
    target.chmod(0o644)
    payload.unlink()


def script(version: str, arch: Arch) -> str:
    """The script of a package from line 4 on; the payload follows its last line."""
    label = f"{_TITLE.format(machine=arch.machine)} {version}"
    text = f"""\
skip=SKIP
label="{label}"
version_string={version}
TARGET_OS="Linux"
TARGET_ARCH="{arch.machine}"
targetdir=NVIDIA-Linux-{arch.machine}-{version}
echo "$label" >&2
echo "put together from Debian's packages by 'nox -s lab' of gardenlinux-nvidia-installer;" >&2
echo "it is there to be read by the build, not to be run" >&2
exit 1
"""
    first = 3 + text.count("\n") + 1
    return text.replace("skip=SKIP", f"skip={first}", 1)


class _Checksums:
    """The two checksums of a package, fed piece by piece."""

    def __init__(self) -> None:
        self.md5 = hashlib.md5(usedforsecurity=False)
        self._crc = crc32.cksum(b"")
        self._size = 0

    @classmethod
    def of(cls, pieces: Iterable[bytes]) -> _Checksums:
        sums = cls()
        for piece in pieces:
            sums.add(piece)
        return sums

    def add(self, piece: bytes) -> None:
        self.md5.update(piece)
        self._crc = crc32.cksum(piece, self._crc)
        self._size += len(piece)

    @property
    def cksum(self) -> int:
        length = self._size.to_bytes((self._size.bit_length() + 7) // 8, "little")
        return int(crc32.cksum(length, self._crc))


def _pack(tree: Path, modes: dict[str, int], target: Path, progress: Callable[[int], None]) -> None:
    compressor = zstandard.ZstdCompressor(level=_LEVEL, threads=_THREADS, write_checksum=True)
    with (
        target.open("wb") as file,
        compressor.stream_writer(file) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, bufsize=CHUNK) as archive,
    ):
        for path in sorted(tree.rglob("*")):
            name = path.relative_to(tree).as_posix()
            info = tarfile.TarInfo(f"./{name}")
            info.mtime = EPOCH
            if path.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
                continue
            info.size = path.stat().st_size
            info.mode = modes.get(name, 0o644 if not path.stat().st_mode & stat.S_IXUSR else 0o755)
            with path.open("rb") as content:
                archive.addfile(info, content)
            progress(info.size)
