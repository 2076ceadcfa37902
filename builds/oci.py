"""OCI image layouts on disk: deterministic layers, content-addressed blobs, an index of named images.

Written after the OCI image specification 1.1 (image layout, manifest, config).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

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
        annotations, platform = dict(value.get("annotations") or {}), dict(value.get("platform") or {})
        architecture = platform.get("architecture")
        texts = [media_type, digest, *annotations, *annotations.values(), *([architecture] if architecture else [])]
        if not all(isinstance(text, str) for text in texts) or type(size) is not int:
            raise TypeError("not a descriptor: something in it is of another type")
        if not _DIGEST.fullmatch(digest) or size < 0:
            raise ValueError(f"not a descriptor: {digest} of {size} bytes")
        return cls(media_type, digest, size, annotations, architecture)

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
    """The names by which the index of a layout knows an image, those of an index that leads to it included."""
    return tuple(
        entry.annotations[REF_NAME]
        for entry in index_entries(layout)
        if REF_NAME in entry.annotations and digest in {leaf.digest for leaf in _manifests(layout, [entry])}
    )


def full_names_of(layout: Path, digest: str) -> tuple[str, ...]:
    """Those of its names that a registry would know, ``<host>/<repository>:<tag>``, or that look like a tag of ours.

    Others, such as ``latest``, are the layout's own affair.
    """
    return tuple(name for name in names_of(layout, digest) if "/" in name or re.match(r"[0-9][0-9.]*-", name))


def find_image(layout: Path, name: str | None = None, arch: Arch | None = None, *, others: bool = False) -> Image:
    """The image that a name means in a layout, for an architecture. Without a name it must be the only one.

    With ``others`` the only one there is will do, where there is none of the architecture.
    Raises ConfigurationError where there is none, or more than one to choose from, and BuildError where it is damaged.
    """
    return read_image(layout, find_entry(layout, name, arch, others=others))


def of_architecture(images: Mapping[str, str | None], arch: Arch | None, *, others: bool) -> tuple[str, ...]:
    """Which of several images are of an architecture: digests, given with what is known of their architectures.

    With ``arch`` None all are; with ``others`` all are where none is.
    """
    fitting = tuple(digest for digest, found in images.items() if arch is None or found in (str(arch), None))
    return fitting or (tuple(images) if others else ())


def find_entry(layout: Path, name: str | None = None, arch: Arch | None = None, *, others: bool = False) -> Descriptor:
    """The descriptor of that image's manifest, which is all that is read of it."""
    if not (layout / "oci-layout").is_file():
        raise ConfigurationError(f"oci:{layout}", "is not an OCI image layout", hint="it has no file oci-layout")
    entries = index_entries(layout)
    found = [entry for entry in entries if name is None or entry.annotations.get(REF_NAME) == name]
    images = {descriptor.digest: descriptor for descriptor in _manifests(layout, found)}
    architectures = {
        digest: _architecture(layout, descriptor) if arch else None for digest, descriptor in images.items()
    }
    fitting = of_architecture(architectures, arch, others=others)
    if len(fitting) != 1:
        known = sorted({entry.annotations.get(REF_NAME, entry.digest) for entry in entries})
        wanted = (f" {name}" if name else "") + (f" for {arch}" if arch else "")
        raise ConfigurationError(
            f"oci:{layout}",
            f"must hold exactly one image{wanted}",
            got=f"{len(fitting)}",
            hint=f"it names {', '.join(known) or 'nothing'}",
        )
    return images[fitting[0]]


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
        if not all(_DIGEST.fullmatch(layer.diff_id) for layer in image.layers):
            raise ValueError("a layer's diff id is no digest")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BuildError(
            f"oci:{layout}", f"manifest or config of {descriptor.digest} is not an image's", got=repr(error)[:200]
        ) from error
    return image


def read_json(layout: Path, digest: str) -> Any:
    """Read a JSON blob, proving its digest. Raises BuildError where it is missing, damaged or no plain JSON."""
    try:
        return parse_json(read_blob(layout, digest))
    except ValueError as error:
        raise BuildError(f"oci:{layout}", f"the blob {digest} is no plain JSON", got=str(error)[:100]) from error


def parse_json(data: bytes) -> Any:
    """JSON that everybody reads alike: UTF-8 without a mark, no name twice, no NaN. Raises ValueError for any other.

    Where a document leaves room, a registry, a runtime and this program could each see another image in it.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name is given twice")
        return values

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(data.decode(), object_pairs_hook=once, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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
    """The images that entries lead to; what is of no platform is no image but somebody's word on one."""
    for entry in entries:
        if entry.architecture == "unknown":
            continue
        if entry.media_type in INDEXES:
            yield from _manifests(layout, _entries(layout, read_blob(layout, entry.digest)))
        else:
            yield entry


def _entries(layout: Path, data: bytes) -> list[Descriptor]:
    """What an index has. Raises BuildError where it cannot be read."""
    try:
        return [Descriptor.from_json(entry) for entry in parse_json(data)["manifests"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(f"oci:{layout}", "has an index that cannot be read", got=repr(error)[:200]) from error


def _architecture(layout: Path, entry: Descriptor) -> str | None:
    """What an index says of an image, or else its config."""
    return entry.architecture or read_image(layout, entry).config.get("architecture")


def index_entries(layout: Path) -> list[Descriptor]:
    """What the index of a layout has. Raises BuildError where it cannot be read."""
    try:
        data = (layout / "index.json").read_bytes()
    except OSError as error:
        raise BuildError(f"oci:{layout}", "has no readable index.json", got=error.strerror) from error
    return _entries(layout, data)


def _write_index(layout: Path, entries: Iterable[Descriptor]) -> None:
    ordered = sorted(
        entries,
        key=lambda entry: (entry.annotations.get(REF_NAME, ""), entry.architecture or "", entry.digest),
    )
    document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry.to_json() for entry in ordered]}
    write_atomically(layout / "index.json", canonical_json(document))
