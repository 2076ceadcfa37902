"""OCI image layouts on disk: deterministic layers, content-addressed blobs, an index of named images.

Written after the OCI image specification 1.1 (image layout, manifest, config, layer filesystem changeset). A
layer's bytes depend on its entries alone: names are sorted, owner and time are fixed, and the compressor's
version is part of every key that leads here (:data:`COMPRESSOR`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import zstandard

from .cache import CHUNK, canonical_json, copy_checked, write_atomically
from .errors import BuildError, ConfigurationError
from .model import Arch

INDEX = "application/vnd.oci.image.index.v1+json"
INDEXES = (INDEX, "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
REF_NAME = "org.opencontainers.image.ref.name"

EPOCH = 315532800
"""mtime of every file, in seconds: 1980-01-01, the earliest that archives of any kind can say."""
CREATED = "1980-01-01T00:00:00Z"

_LEVEL, _THREADS = 10, 2
COMPRESSOR = f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))} level {_LEVEL} threads"
"""What the bytes of a compressed layer depend on, besides its content. libzstd splits its work into the same
jobs for any number of threads but none, so the number is fixed and not 0."""


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
class Descriptor:
    """A reference to a blob, as manifests and indexes hold it."""

    media_type: str
    digest: str
    size: int
    """In bytes."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Descriptor:
        """Read a descriptor out of a manifest or an index. Raises KeyError, TypeError or ValueError for what is none.

        Digests become paths and sizes become limits, so neither may be anything else. sha256 is the one algorithm
        that registries must know.
        """
        media_type, digest, size = value["mediaType"], value["digest"], value["size"]
        if not isinstance(media_type, str) or not isinstance(digest, str) or type(size) is not int:
            raise TypeError(f"not a descriptor: {value}")
        if not _DIGEST.fullmatch(digest) or size < 0:
            raise ValueError(f"not a descriptor: {digest} of {size} bytes")
        return cls(
            media_type,
            digest,
            size,
            dict(value.get("annotations") or {}),
            (value.get("platform") or {}).get("architecture"),
        )

    def to_json(self) -> dict[str, Any]:
        """The descriptor as manifests and indexes hold it."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        if self.architecture:
            value["platform"] = {"architecture": self.architecture, "os": "linux"}
        return value


_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Layer:
    """A layer's blob and the digest of its uncompressed tar, which the image's config lists."""

    descriptor: Descriptor
    diff_id: str


@dataclass(frozen=True)
class Image:
    """An image in a layout: the digest of its manifest, the manifest, the config."""

    layout: Path
    descriptor: Descriptor
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Digest of the manifest: the identity of the image."""
        return self.descriptor.digest

    @property
    def config_descriptor(self) -> Descriptor:
        """The blob of its config."""
        return Descriptor.from_json(self.manifest["config"])

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers, lowest first."""
        blobs = [Descriptor.from_json(layer) for layer in self.manifest["layers"]]
        return tuple(Layer(blob, diff) for blob, diff in zip(blobs, self.config["rootfs"]["diff_ids"], strict=True))

    @property
    def size(self) -> int:
        """Bytes of its manifest, config and layers: what a registry stores and a node pulls."""
        return self.descriptor.size + self.config_descriptor.size + sum(layer.descriptor.size for layer in self.layers)


def blob_path(layout: Path, digest: str) -> Path:
    """Where a layout keeps a blob. Raises BuildError for what is no digest: it would lead elsewhere."""
    if not _DIGEST.fullmatch(digest):
        raise BuildError(f"oci:{layout}", "names a blob by what is no sha256 digest", got=repr(digest)[:100])
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def create(layout: Path) -> None:
    """Make an empty layout, unless one is there."""
    (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    if not (layout / "index.json").exists():
        write_atomically(layout / "oci-layout", '{"imageLayoutVersion":"1.0.0"}')
        _write_index(layout, [])


def add_bytes(layout: Path, data: bytes, media_type: str, **more: Any) -> Descriptor:
    """Add a blob to a layout."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    path = blob_path(layout, digest)
    if not path.exists():
        write_atomically(path, data)
    return Descriptor(media_type, digest, len(data), **more)


def add_layer(layout: Path, layer: Layer, source: Path) -> None:
    """Copy a layer's blob into a layout, proving its digest on the way."""
    path = blob_path(layout, layer.descriptor.digest)
    if not path.exists():
        temporary = path.with_name(path.name + ".part")
        copy_checked(source, temporary, layer.descriptor.digest.removeprefix("sha256:"))
        temporary.rename(path)


def add_image(
    layout: Path,
    layers: Iterable[Layer],
    *,
    arch: Arch,
    names: Iterable[str],
    config: Mapping[str, Any] | None = None,
    annotations: Mapping[str, str] | None = None,
    history: Iterable[str] = (),
) -> Image:
    """Write config and manifest of an image whose layers are in the layout, and name it in the index.

    ``config`` is the run configuration (``Env``, ``Labels`` …); ``history`` says what made each layer.
    """
    layers = tuple(layers)
    document = {
        "architecture": str(arch),
        "os": "linux",
        "created": CREATED,
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": CREATED, "created_by": line} for line in history],
    }
    config_blob = add_bytes(layout, canonical_json(document), CONFIG)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config_blob.to_json(),
        "layers": [layer.descriptor.to_json() for layer in layers],
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    descriptor = add_bytes(layout, canonical_json(manifest), MANIFEST, architecture=str(arch))
    name_image(layout, descriptor, names)
    return Image(layout, descriptor, manifest, document)


def name_image(layout: Path, descriptor: Descriptor, names: Iterable[str]) -> None:
    """Let names of the index point at an image; one that pointed elsewhere for the same architecture moves.

    Whoever shares a layout with other writers holds its lock meanwhile.
    """
    names = tuple(names)
    kept = [
        other
        for other in index_entries(layout)
        if not (other.annotations.get(REF_NAME) in names and other.architecture == descriptor.architecture)
    ]
    named = [
        Descriptor(
            descriptor.media_type,
            descriptor.digest,
            descriptor.size,
            {REF_NAME: name},
            descriptor.architecture,
        )
        for name in names
    ]
    _write_index(layout, kept + named)


def names_of(layout: Path, digest: str) -> tuple[str, ...]:
    """The names by which the index of a layout knows an image."""
    return tuple(
        entry.annotations[REF_NAME]
        for entry in index_entries(layout)
        if entry.digest == digest and REF_NAME in entry.annotations
    )


def full_names_of(layout: Path, digest: str) -> tuple[str, ...]:
    """Those of its names that a registry would know, ``<host>/<repository>:<tag>``; others are the layout's own."""
    return tuple(name for name in names_of(layout, digest) if ":" in name.partition("/")[2])


def find_image(layout: Path, name: str | None = None, arch: Arch | None = None) -> Image:
    """The image that a name means in a layout, for an architecture. Without a name it must be the only one.

    Raises ConfigurationError where there is none, or more than one to choose from, and BuildError where it is damaged.
    """
    return read_image(layout, find_entry(layout, name, arch))


def find_entry(layout: Path, name: str | None = None, arch: Arch | None = None) -> Descriptor:
    """The descriptor of that image's manifest, which is all that is read of it."""
    if not (layout / "oci-layout").is_file():
        raise ConfigurationError(f"oci:{layout}", "is not an OCI image layout", hint="it has no file oci-layout")
    entries = index_entries(layout)
    found = [entry for entry in entries if name is None or entry.annotations.get(REF_NAME) == name]
    images = {
        descriptor.digest: descriptor
        for descriptor in _manifests(layout, found)
        if arch is None or _architecture(layout, descriptor) in (str(arch), None)
    }
    if len(images) != 1:
        known = sorted({entry.annotations.get(REF_NAME, entry.digest) for entry in entries})
        wanted = f"{name or 'an image'}" + (f" for {arch}" if arch else "")
        raise ConfigurationError(
            f"oci:{layout}",
            f"must hold exactly one image {wanted}",
            got=f"{len(images)}",
            hint=f"it names {', '.join(known) or 'nothing'}",
        )
    return next(iter(images.values()))


def read_image(layout: Path, descriptor: Descriptor) -> Image:
    """Read an image's manifest and config. Raises BuildError where the layout lacks or damages one."""
    try:
        manifest = read_json(layout, descriptor.digest)
        image = Image(layout, descriptor, manifest, read_json(layout, manifest["config"]["digest"]))
        if not isinstance(image.config["architecture"], str):
            raise TypeError("it has no architecture")
        if not isinstance(image.config.get("config") or {}, dict):
            raise TypeError("its configuration is none")
        _ = image.size  # every descriptor in it can be read
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BuildError(
            f"oci:{layout}", f"manifest or config of {descriptor.digest} is not an image's", got=repr(error)
        ) from error
    return image


def read_json(layout: Path, digest: str) -> Any:
    """Read a JSON blob, proving its digest. Raises BuildError where it is missing or damaged."""
    return json.loads(read_blob(layout, digest))


def read_blob(layout: Path, digest: str) -> bytes:
    """Read a small blob, proving its digest. Raises BuildError where it is missing or damaged."""
    try:
        data = blob_path(layout, digest).read_bytes()
    except OSError as error:
        raise BuildError(f"oci:{layout}", f"has no blob {digest}", got=error.strerror) from error
    found = "sha256:" + hashlib.sha256(data).hexdigest()
    if found != digest:
        raise BuildError(f"oci:{layout}", f"the blob named {digest} has other bytes", got=found)
    return data


def write_layer(entries: Iterable[Entry], target: Path, progress: Callable[[int], None] | None = None) -> Layer:
    """Write entries as one compressed layer to a file. The same entries give the same bytes on every machine.

    Folders that lead to an entry are added where none is given. ``progress`` is told bytes of content.
    """
    known: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in known:
            raise BuildError(f"layer {target.name}", "has two entries of one name", got=entry.path)
        known[entry.path] = entry
    for path in list(known):
        for parent in Path(path).parents:
            if str(parent) != ".":
                known.setdefault(str(parent), Entry(str(parent), "dir"))

    def write(stream: IO[bytes]) -> None:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as archive:
            for path in sorted(known):
                _add_entry(archive, known[path])
                if progress and known[path].kind == "file":
                    progress(_size(known[path]))

    return _compress(write, target)


def layer_from_tar(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> Layer:
    """Compress a tar as it is to a layer: for archives that already are deterministic."""

    def write(stream: IO[bytes]) -> None:
        with source.open("rb") as reader:
            while chunk := reader.read(CHUNK):
                stream.write(chunk)
                if progress:
                    progress(len(chunk))

    return _compress(write, target)


@contextmanager
def open_layer(layout: Path, layer: Descriptor) -> Iterator[IO[bytes]]:
    """The uncompressed tar of a layer as a stream. Raises BuildError where the blob is missing or damaged."""
    try:
        with blob_path(layout, layer.digest).open("rb") as blob:
            magic = blob.read(4)
            blob.seek(0)
            if magic == b"\x28\xb5\x2f\xfd":
                with zstandard.ZstdDecompressor().stream_reader(blob, read_across_frames=True) as stream:
                    yield stream
            elif magic[:2] == b"\x1f\x8b":
                with gzip.open(blob) as stream:
                    yield stream  # type: ignore[misc]
            else:
                yield blob
    except (zstandard.ZstdError, zlib.error, EOFError, gzip.BadGzipFile, FileNotFoundError) as error:
        raise BuildError(f"oci:{layout}", f"the layer {layer.digest} is damaged or missing", got=str(error)) from error


def check_blobs(image: Image, progress: Callable[[int], None] | None = None) -> None:
    """Prove that every blob of an image has the bytes its digest says.

    Raises BuildError naming the first that has not.
    """
    for blob in (image.descriptor, image.config_descriptor, *(layer.descriptor for layer in image.layers)):
        path = blob_path(image.layout, blob.digest)
        digest = hashlib.sha256()
        if not path.is_file():
            raise BuildError(f"oci:{image.layout}", f"has no blob {blob.digest}")
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                if progress:
                    progress(len(chunk))
        if f"sha256:{digest.hexdigest()}" != blob.digest:
            raise BuildError(
                f"oci:{image.layout}",
                f"the blob named {blob.digest} has other bytes",
                got=f"sha256:{digest.hexdigest()}",
            )


def _manifests(layout: Path, entries: Iterable[Descriptor]) -> Iterator[Descriptor]:
    for entry in entries:
        if entry.media_type in INDEXES:
            yield from _manifests(layout, map(Descriptor.from_json, read_json(layout, entry.digest)["manifests"]))
        else:
            yield entry


def _architecture(layout: Path, entry: Descriptor) -> str | None:
    """What an index says of an image, or else its config."""
    return entry.architecture or read_image(layout, entry).config.get("architecture")


def index_entries(layout: Path) -> list[Descriptor]:
    """What the index of a layout has. Raises ConfigurationError where it cannot be read."""
    try:
        document = json.loads((layout / "index.json").read_bytes())
        return [Descriptor.from_json(entry) for entry in document["manifests"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"oci:{layout}", "has no readable index.json", got=repr(error)) from error


def _write_index(layout: Path, entries: Iterable[Descriptor]) -> None:
    ordered = sorted(
        entries,
        key=lambda entry: (entry.annotations.get(REF_NAME, ""), entry.architecture or "", entry.digest),
    )
    document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry.to_json() for entry in ordered]}
    write_atomically(layout / "index.json", canonical_json(document))


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
    """Passes bytes on and keeps their digest and number."""

    def __init__(self, target: IO[bytes]) -> None:
        self.target, self.hash, self.size = target, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += len(data)
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
