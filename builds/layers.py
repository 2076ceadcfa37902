"""Layers of our own making: deterministic, kept in the cache, written once per key and shared by every image.

A layer's bytes depend on its entries alone: names are sorted, owner and time are fixed, and the compressor's version
is part of every key that leads here (:data:`COMPRESSOR`). Written after the OCI image specification 1.1 (layer
filesystem changeset).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import zstandard

from .cache import CHUNK, Cache
from .console import Reporter
from .errors import BuildError
from .oci import EPOCH, LAYER_ZSTD, Descriptor, Layer

_LEVEL, _THREADS = 10, 2
COMPRESSOR = f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))} level {_LEVEL} threads"
"""What the bytes of a compressed layer depend on, besides its content. libzstd splits its work into the same
jobs for any number of threads but none, so the number is fixed and not 0."""

_BLOB = "layer"
_META = "layer.json"


@dataclass(frozen=True)
class Entry:
    """One file, folder or symlink of a layer. Its owner is root and its time is :data:`EPOCH`."""

    path: str
    """Relative to the root of the image, without a leading slash."""
    kind: Literal["file", "dir", "symlink"]
    mode: int = 0o755
    source: Path | bytes = b""
    """Content of a file: a path to read, or the bytes themselves."""
    target: str = ""
    """Target of a symlink."""


@dataclass(frozen=True)
class StoredLayer:
    """A layer and the file that holds its blob."""

    layer: Layer
    blob: Path


def stored(title: str, key: str, entries: Callable[[], Iterable[Entry]], cache: Cache, report: Reporter) -> StoredLayer:
    """The layer of a key; ``entries`` is asked for its content if no earlier run made it."""

    def make(folder: Path) -> None:
        with report.step(title) as step, report.bytes(title, None) as advance:
            layer = write_layer(entries(), folder / _BLOB, advance)
            document = {"descriptor": layer.descriptor.to_json(), "diff_id": layer.diff_id}
            (folder / _META).write_text(json.dumps(document))
            step.note(f"{layer.descriptor.size / 1e6:.1f} MB")

    folder, _ = cache.make("layers", key, make)
    document = json.loads((folder / _META).read_text())
    return StoredLayer(Layer(Descriptor.from_json(document["descriptor"]), document["diff_id"]), folder / _BLOB)


def write_layer(entries: Iterable[Entry], target: Path, progress: Callable[[int], None] | None = None) -> Layer:
    """Write entries as one compressed layer to a file. The same entries give the same bytes on every machine.

    Folders that lead to an entry are added where none is given. ``progress`` is told bytes of content.
    """

    def write(stream: IO[bytes]) -> None:
        _write_tar(entries, stream, target.name, progress)

    return _compress(write, target)


def diff_id(entries: Iterable[Entry]) -> str:
    """Digest of the uncompressed tar that :func:`write_layer` makes of entries."""
    digesting: Any = _Digesting(None)
    _write_tar(entries, digesting, "layer", None)
    return f"sha256:{digesting.hash.hexdigest()}"


def _write_tar(entries: Iterable[Entry], stream: IO[bytes], name: str, progress: Callable[[int], None] | None) -> None:
    known: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in known:
            raise BuildError(f"layer {name}", "has two entries of one name", got=entry.path)
        known[entry.path] = entry
    for path in list(known):
        for parent in Path(path).parents:
            if str(parent) != ".":
                known.setdefault(str(parent), Entry(str(parent), "dir"))

    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as archive:
        for path in sorted(known):
            _add_entry(archive, known[path])
            if progress and known[path].kind == "file":
                progress(_size(known[path]))


def layer_from_tar(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> Layer:
    """Compress a tar as it is to a layer: for archives that already are deterministic."""

    def write(stream: IO[bytes]) -> None:
        with source.open("rb") as reader:
            while chunk := reader.read(CHUNK):
                stream.write(chunk)
                if progress:
                    progress(len(chunk))

    return _compress(write, target)


def _size(entry: Entry) -> int:
    return len(entry.source) if isinstance(entry.source, bytes) else entry.source.stat().st_size


def _add_entry(archive: tarfile.TarFile, entry: Entry) -> None:
    info = tarfile.TarInfo(entry.path)
    info.mode, info.mtime = entry.mode, EPOCH
    if entry.kind == "dir":
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    elif entry.kind == "symlink":
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.target, 0o777
        archive.addfile(info)
    else:
        info.size = _size(entry)
        with io.BytesIO(entry.source) if isinstance(entry.source, bytes) else entry.source.open("rb") as content:
            archive.addfile(info, content)


class _Digesting(io.RawIOBase):
    """Passes bytes on, if there is anywhere to, and keeps their digest and number."""

    def __init__(self, target: IO[bytes] | None) -> None:
        self.target, self.hash, self.size = target, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += len(data)
        if self.target:
            self.target.write(data)
        return len(data)


def _compress(write: Callable[[IO[bytes]], None], target: Path) -> Layer:
    with target.open("wb") as file:
        compressed: Any = _Digesting(file)
        with zstandard.ZstdCompressor(level=_LEVEL, threads=_THREADS).stream_writer(
            compressed,
            closefd=False,
        ) as compressor:
            plain: Any = _Digesting(compressor)
            write(plain)
    descriptor = Descriptor(LAYER_ZSTD, f"sha256:{compressed.hash.hexdigest()}", compressed.size)
    return Layer(descriptor, f"sha256:{plain.hash.hexdigest()}")
