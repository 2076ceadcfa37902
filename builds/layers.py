"""Layers of our own making, kept in the cache: written once per key, shared by every image that has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import oci
from .cache import Cache
from .console import Reporter
from .oci import Descriptor, Entry, Layer

_BLOB = "layer"
_META = "layer.json"


@dataclass(frozen=True)
class StoredLayer:
    """A layer and the file that holds its blob."""

    layer: Layer
    blob: Path


def stored(title: str, key: str, entries: Callable[[], Iterable[Entry]], cache: Cache, report: Reporter) -> StoredLayer:
    """The layer of a key; ``entries`` is asked for its content if no earlier run made it."""

    def make(folder: Path) -> None:
        with report.step(title) as step, report.bytes(title, None) as advance:
            layer = oci.write_layer(entries(), folder / _BLOB, advance)
            document = {"descriptor": layer.descriptor.to_json(), "diff_id": layer.diff_id}
            (folder / _META).write_text(json.dumps(document))
            step.note(f"{layer.descriptor.size / 1e6:.1f} MB")

    folder, _ = cache.make("layers", key, make)
    document = json.loads((folder / _META).read_text())
    return StoredLayer(Layer(Descriptor.from_json(document["descriptor"]), document["diff_id"]), folder / _BLOB)
