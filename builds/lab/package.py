"""Writes a driver package: a driver tree's ``.manifest``, and the ``.run`` file around the tree.

A ``.run`` file is a shell script with an archive behind it. Line 2 has the POSIX cksum, line 3 the MD5, of all
that follows line 3; ``skip`` is the number of the line where the archive starts. The vendor's form changed over the
years (:class:`Form`), and so does the lab's, for the reader to see all of them.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import stat
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import zstandard
from fastcrc import crc32

from ..cache import CHUNK
from ..model import MODULES, Arch
from ..oci import EPOCH

_LEVEL, _THREADS, _PRESET = 9, 2, 1
COMPRESSOR = f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))} level {_LEVEL} threads {_THREADS}; xz {_PRESET}"
"""What a package's bytes depend on, besides its content. (liblzma does not say its version to Python; its output has
been the same for years, and a package is known by its digest anyway.)"""

_TITLE = "NVIDIA Accelerated Graphics Driver for Linux-{machine}"

_DECOMPRESSOR = b"\n".join(
    (
        b"#! /bin/sh",
        b"# stands where the vendor has a static zstd; a reader unpacks by itself and never runs it",
        b"echo 'the lab has no decompressor' >&2",
        b"exit 1",
        # What a program has as well: lines that look like the script's, and bytes of every kind.
        b"skip=7; MD5=0",
        bytes(range(256)) * 64,
        b"",
    )
)
"""What is embedded as decompressor. It works on nothing: whoever runs it finds out."""

Payload = Literal["zstd", "xz", "gzip"]


@dataclass(frozen=True)
class Form:
    """How a package is made around the same content."""

    payload: Payload = "zstd"
    decompressor: bool = False
    """Whether a program that unpacks the payload stands between script and payload."""
    old: bool = False
    """Whether the header is as in the years of gzip: sums in quotes, the CRC of ten digits, more variables."""


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
    tree: Path,
    version: str,
    arch: Arch,
    lines: Sequence[Line],
    target: Path,
    progress: Callable[[int], None],
    form: Form = Form(),
) -> None:
    """Write the package of a driver tree to ``target``. The same tree gives the same bytes on every machine.

    ``lines`` is what the manifest has, and gives each file its permissions. ``progress`` is told bytes of content.
    The caller renames the folder of ``target`` into place.
    """
    (tree / ".manifest").write_text(manifest(version, arch, lines))
    payload = target.with_name(target.name + ".payload")
    modes = {line.path: line.mode & 0o777 for line in lines if line.mode}
    _pack(tree, modes, payload, progress, form.payload)
    covered = script(version, arch, form).encode() + (_DECOMPRESSOR if form.decompressor else b"")
    with payload.open("rb") as stream:
        sums = _Checksums()
        sums.add(covered)
        while chunk := stream.read(CHUNK):
            sums.add(chunk)
        stream.seek(0)
        with target.open("wb") as file:
            md5 = sums.md5.hexdigest()
            above = f'CRCsum="{sums.cksum:010}"\nMD5="{md5}"' if form.old else f"CRCsum={sums.cksum}\nMD5={md5}"
            file.write(f"#! /bin/sh\n{above}\n".encode())
            file.write(covered)
            while chunk := stream.read(CHUNK):
                file.write(chunk)
    target.chmod(0o644)
    payload.unlink()


def script(version: str, arch: Arch, form: Form = Form()) -> str:
    """The script of a package from line 4 on; decompressor, if it has one, and payload follow its last line."""
    label = f"{_TITLE.format(machine=arch.machine)} {version}"
    text = f"""\
skip=SKIP
label="{label}"
version_string={version}
TARGET_OS="Linux"
TARGET_ARCH="{arch.machine}"
targetdir=NVIDIA-Linux-{arch.machine}-{version}
{_variables(form)}echo "$label" >&2
echo "put together from Debian's packages by 'nox -s lab' of gardenlinux-nvidia-installer;" >&2
echo "it is there to be read by the build, not to be run" >&2
exit 1
"""
    first = 3 + text.count("\n") + 1
    size = _DECOMPRESSOR.count(b"\n") if form.decompressor else 0
    text = text.replace("skip_decompress=FIRST", f"skip_decompress={first}", 1)
    return text.replace("skip=SKIP", f"skip={first + size}", 1)


def _variables(form: Form) -> str:
    """What the script of a form has besides."""
    lines = ["script=./nvidia-installer", 'scriptargs=""', "keep=n", "TMPROOT=${TMPDIR:=/tmp}"] if form.old else []
    if form.decompressor:
        lines += ["skip_decompress=FIRST", f"size_decompress={_DECOMPRESSOR.count(10)}"]
    return "".join(f"{line}\n" for line in lines)


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


def _compressed(file: IO[bytes], payload: Payload) -> AbstractContextManager[Any]:
    match payload:
        case "zstd":
            zstd = zstandard.ZstdCompressor(level=_LEVEL, threads=_THREADS, write_checksum=True)
            writer: AbstractContextManager[Any] = zstd.stream_writer(file)
            return writer
        case "xz":
            return lzma.open(file, "wb", preset=_PRESET)
        case "gzip":
            return gzip.GzipFile("", "wb", _LEVEL, file, mtime=0)


def _pack(tree: Path, modes: dict[str, int], target: Path, progress: Callable[[int], None], payload: Payload) -> None:
    with (
        target.open("wb") as file,
        _compressed(file, payload) as stream,
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
