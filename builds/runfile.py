"""The vendor's driver package ``NVIDIA-Linux-<machine>-<version>.run``: read, checked and unpacked, never executed.

A package is a shell script with a compressed tar behind it. Its first lines say, as shell variables, where the
payload starts and which checksums the rest has; that is all this module takes from the script, so a web page saved
under the package's name is refused instead of being run.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any

import zstandard
from fastcrc import crc32

from . import tars
from .cache import CHUNK, disk_errors
from .errors import BuildError
from .model import Arch

_HEADER = 256 * 1024
"""Bytes within which the variables stand; real headers have some 30 kB."""

_BEFORE_PAYLOAD = 64 * 1024 * 1024
"""Bytes within which the payload starts; an embedded decompressor has a few MB."""

_COVERED_FROM = 4
"""CRCsum and MD5 cover the package from this line on: they stand above it."""

_PIECE = 64 * 1024
"""Compressed bytes unpacked at a time: bounds what a piece can swell to."""

_AGAIN = "delete the file and download it again"

_LINE = r"[1-9]\d{0,8}"
"""Number of a line."""

_MAY_LACK = ("CRCsum", "MD5", "skip_decompress", "size_decompress")
"""Variables that not every package has."""

_ASSIGNMENT = re.compile(
    r"""(?:^|;)[ \t]*(\w+)=(?:"([^"\n]*)"|'([^'\n]*)'|([^\s;"']*))(?=[ \t]*(?:;|$))""", re.MULTILINE
)

_DAMAGES = (
    *(zstandard.ZstdError, lzma.LZMAError, zlib.error, tarfile.TarError),
    *(EOFError, LookupError, ValueError, OverflowError, OSError),
)
"""What the unpackers raise over damaged bytes: LookupError of a hard link to nothing, OverflowError of a time that no
file can have."""

_COMPRESSIONS: tuple[tuple[str, bytes, Callable[[], Any]], ...] = (
    # Long-range frames need a window above the library's default limit of 128 MiB.
    ("zstd", b"\x28\xb5\x2f\xfd", lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()),
    ("xz", b"\xfd7zXZ\0", lzma.LZMADecompressor),
    ("gzip", b"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),
    ("bzip2", b"BZh", bz2.BZ2Decompressor),
)
"""What a payload is compressed with: its name, its magic bytes, and what unpacks one stream of it."""


@dataclass(frozen=True)
class RunHeader:
    """What the shell header of a package says of it. A checksum that is all zeros was not given: None."""

    crc: int | None
    """POSIX cksum of everything from line 4 on."""
    md5: str | None
    """MD5 of the same bytes, lower-case hex."""
    skip: int
    """Number of the line the payload starts at, the first being 1."""
    version: str
    target_os: str
    machine: str
    """The vendor's name of the architecture, as ``uname -m`` has it."""
    label: str
    targetdir: str
    decompressor: tuple[int, int] | None = None
    """First line and number of lines of an embedded program that would unpack the payload; it is never run."""


def package_name(version: str, arch: Arch) -> str:
    """The file name the vendor gives a package."""
    return f"NVIDIA-Linux-{arch.machine}-{version}.run"


def read_header(path: Path) -> RunHeader:
    """Read the header of a package. Raises BuildError where the file is none, or its header lacks something."""
    with _opened(path) as stream:
        head = stream.read(_HEADER)
    first = head.split(b"\n", 1)[0]
    if not re.match(rb"#!\s*/\S*sh\b", first):
        raise BuildError(path.name, "is not a driver package", got=_looks_like(head), hint=_AGAIN)
    values = _assignments(head)
    if re.fullmatch(_LINE, values.get("skip", "")):
        # What looks like an assignment behind the script is payload.
        values = _assignments(b"\n".join(head.split(b"\n")[: int(values["skip"]) - 1]))
    problems = [
        f"{name}={values[name]}" if name in values else f"no {name}="
        for name, pattern in (
            ("skip", _LINE),
            ("version_string", r"\S+"),
            ("TARGET_OS", r"\S+"),
            ("TARGET_ARCH", r"\S+"),
            ("CRCsum", r"\d{0,10}"),
            ("MD5", r"[0-9A-Fa-f]{32}|0*"),
            ("skip_decompress", r"\d{0,9}"),
            ("size_decompress", r"\d{0,9}"),
        )
        if not re.fullmatch(pattern, values.get(name, "" if name in _MAY_LACK else "\n"))
    ]
    if not problems and int(values["skip"]) <= _COVERED_FROM:
        problems = [f"skip={values['skip']}"]
    if problems:
        raise BuildError(path.name, "has a header that is not a driver package's", got=", ".join(problems), hint=_AGAIN)
    md5 = values.get("MD5", "").lower()
    return RunHeader(
        crc=int(values.get("CRCsum") or 0) or None,
        md5=md5 if md5.strip("0") else None,
        skip=int(values["skip"]),
        version=values["version_string"],
        target_os=values["TARGET_OS"],
        machine=values["TARGET_ARCH"],
        label=values.get("label", ""),
        targetdir=values.get("targetdir", ""),
        decompressor=(at, int(values.get("size_decompress") or 0))
        if (at := int(values.get("skip_decompress") or 0))
        else None,
    )


def check(
    path: Path,
    header: RunHeader,
    *,
    version: str,
    arch: Arch,
    sha256: str | None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Check a package, in one pass, against what was asked for, its pin and its own checksums; its sha256, in hex.

    ``progress`` is told the bytes of each chunk. Raises BuildError for another version, architecture or system,
    for a checksum that differs, and for a package that has neither a checksum of its own nor a pin: the vendor
    signs nothing, so there would be nothing to tell a damaged one by.
    """
    for what, expected, got in (
        ("system", "Linux", header.target_os),
        ("architecture", arch.machine, header.machine),
        ("version", version, header.version),
    ):
        if got != expected:
            hint = f"the file should be the vendor's {package_name(version, arch)}"
            raise BuildError(path.name, f"is not of {what} {expected}", got=got, hint=hint)
    if sha256 is None and header.crc is None and header.md5 is None:
        raise BuildError(
            path.name, "has no checksum of its own, and none is pinned", hint="pin its sha256 in the matrix file"
        )
    whole, own, crc, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), crc32.cksum(b""), 0
    with _opened(path) as stream:
        above = stream.read(_offset_of_line(path.name, stream, _COVERED_FROM))
        whole.update(above)
        if progress:
            progress(len(above))
        while chunk := stream.read(CHUNK):
            whole.update(chunk)
            own.update(chunk)
            crc = crc32.cksum(chunk, crc)
            size += len(chunk)
            if progress:
                progress(len(chunk))
    # POSIX cksum goes on over the length, least significant byte first, without leading zeros.
    crc = crc32.cksum(size.to_bytes((size.bit_length() + 7) // 8, "little"), crc)
    for name, wanted, found in (
        ("expected sha256", sha256 and sha256.lower(), whole.hexdigest()),
        ("header's MD5", header.md5, own.hexdigest()),
        ("header's CRC", header.crc, crc),
    ):
        if wanted is not None and wanted != found:
            raise BuildError(
                path.name, f"is damaged, cut short or altered: the {name} is {wanted}", got=str(found), hint=_AGAIN
            )
    return whole.hexdigest()


def payload_format(path: Path, header: RunHeader) -> str:
    """What the payload is: ``zstd``, ``xz``, ``gzip`` or ``bzip2`` (each with a tar in it), or ``tar``.

    Raises BuildError for anything else.
    """
    with _opened(path) as stream:
        stream.seek(_offset_of_line(path.name, stream, header.skip))
        name, _ = _compression(path.name, stream.read(_PIECE))
    return name


def unpack(path: Path, header: RunHeader, dest: Path, *, progress: Callable[[int], None] | None = None) -> None:
    """Unpack the payload into ``dest``, which must be absent or empty, so that it holds ``.manifest`` at its top.

    ``progress`` is told bytes of the package as they are used. What is in ``dest`` after an error is of no use;
    the caller renames it into place after success. Raises BuildError for a payload that is damaged, cut short, of
    no known format, or would write outside ``dest``, InfrastructureError where the disk is full.
    """
    if dest.exists() and any(dest.iterdir()):
        raise BuildError(path.name, f"is not unpacked into {dest.name}: it is not empty")
    with _opened(path) as stream, _damage(path.name), disk_errors(path.name, dest):
        dest.mkdir(parents=True, exist_ok=True)
        stream.seek(_offset_of_line(path.name, stream, header.skip))
        source = _Source(_tar_of(path.name, stream, progress or (lambda _: None)))
        with tarfile.open(fileobj=source, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                _refuse_escape(path.name, member)
                tars.extract(archive, member, dest)
            while source.read():
                pass  # to the end, for the compressed stream's own check
            # tarfile takes a damaged header for the end of the archive; the real end is zeros, 1024 or more.
            if not 1024 <= source.size - archive.offset <= source.zeros:
                raise tarfile.ReadError("the tar has no end")
        _hoist(dest)
    if not (dest / ".manifest").is_file():
        raise BuildError(path.name, "holds no .manifest", got=", ".join(sorted(p.name for p in dest.iterdir())[:5]))


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise BuildError(path.name, "cannot be read", got=error.strerror) from error


@contextmanager
def _damage(subject: str) -> Iterator[None]:
    """Turn what the unpackers raise over damaged bytes into one error; bz2 and a bent path raise OSError."""
    try:
        yield
    except _DAMAGES as error:
        raise BuildError(subject, "has a damaged payload", got=str(error), hint=_AGAIN) from error


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    if re.search(rb"<(?:!doctype\s+html|html|head|body)\b", head[:4096], re.IGNORECASE):
        return "a web page"
    return f"a file that starts with {head[:16]!r}"


def _assignments(script: bytes) -> dict[str, str]:
    """The shell variables of a script, as first assigned; later ones are in its functions."""
    values: dict[str, str] = {}
    for found in _ASSIGNMENT.finditer(script.decode("latin-1")):
        values.setdefault(found[1], found[2] or found[3] or found[4] or "")
    return values


def _offset_of_line(subject: str, stream: IO[bytes], line: int) -> int:
    """Offset of the first byte of a line; the stream is left at the start of the file."""
    stream.seek(0)
    offset, wanted = 0, line - 1
    while offset < _BEFORE_PAYLOAD and (chunk := stream.read(CHUNK)):
        newlines = chunk.count(b"\n")
        if newlines >= wanted:
            at = 0
            for _ in range(wanted):
                at = chunk.index(b"\n", at) + 1
            stream.seek(0)
            return offset + at
        offset, wanted = offset + len(chunk), wanted - newlines
    raise BuildError(subject, f"has no line {line}, where its payload should start", hint=_AGAIN)


def _tar_of(subject: str, stream: IO[bytes], progress: Callable[[int], None]) -> Iterator[bytes]:
    """The tar in a payload, piece by piece. A payload may be several compressed streams, padded with zeros."""
    pieces = iter(lambda: stream.read(_PIECE), b"")
    first = next(pieces, b"")
    _, make = _compression(subject, first)
    unpacker: Any = make() if make else None
    for piece in chain((first,), pieces):
        progress(len(piece))
        if make is None:
            yield piece
            continue
        rest = piece
        while rest:
            if unpacker.eof:
                rest = rest.lstrip(b"\0")
                if not rest:
                    break
                unpacker = make()
            yield unpacker.decompress(rest)
            rest = unpacker.unused_data
    if make and not unpacker.eof:
        raise EOFError("it ends inside its compressed stream")


def _compression(subject: str, first: bytes) -> tuple[str, Callable[[], Any] | None]:
    """Name of a payload's format by its first bytes, and what unpacks it; None: it is a tar as it is."""
    for name, magic, make in _COMPRESSIONS:
        if first.startswith(magic):
            return name, make
    if first[257:262] != b"ustar":
        raise BuildError(subject, "has a payload of no known format", got=repr(first[:8]), hint=_AGAIN)
    return "tar", None


class _Source:
    """What tarfile reads from: pieces of any size. Counts the bytes, and the zeros they end with."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self.size, self.zeros = pieces, 0, 0

    def read(self, _size: int = -1) -> bytes:
        piece = next(filter(None, self._pieces), b"")
        content = len(piece.rstrip(b"\0"))
        self.zeros = len(piece) - content if content else self.zeros + len(piece)
        self.size += len(piece)
        return piece


def _refuse_escape(subject: str, member: tarfile.TarInfo) -> None:
    """Refuse what tarfile's own filter would bend into place: a package that tries is not the vendor's."""
    for name in (member.name, member.linkname):
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise BuildError(
                subject, "holds a path that leads out of it", got=f"{member.name} {member.linkname}".strip()
            )


def _hoist(dest: Path) -> None:
    """Where everything sits in one folder, put its content in its place."""
    match list(dest.iterdir()):
        case [top] if (top / ".manifest").is_file() and not top.is_symlink():
            top = top.rename(dest / ".hoisted")
            for child in list(top.iterdir()):
                child.rename(dest / child.name)
            top.rmdir()
