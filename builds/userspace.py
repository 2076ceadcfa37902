"""User space: what a data-centre node needs of a driver package besides the modules, as one layer.

It depends on the driver package and the architecture, never on the kernel, so all images of a driver share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import layers, manifest, paths
from .cache import Cache
from .console import Reporter
from .errors import BuildError
from .layers import Entry, StoredLayer
from .manifest import Placed
from .model import Arch
from .plan import Plan


def selection(tree: Path, arch: Arch) -> tuple[Placed, ...]:
    """Files and links of the driver root, by the manifest of a driver tree, SONAME links included.

    Raises BuildError for a manifest that is not understood or names what the package does not hold.
    """
    try:
        text = (tree / ".manifest").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError("driver package", "has no readable .manifest", got=str(error)) from error
    chosen = manifest.select(manifest.parse(text), arch)
    if lacking := manifest.missing(manifest.parse(text), chosen, tree):
        raise BuildError("driver package", "lacks what its manifest promises", got="; ".join(lacking))
    return chosen + manifest.soname_links(chosen, tree)


def layer(plan: Plan, tree: Path, cache: Cache, report: Reporter) -> StoredLayer:
    """The user space as a layer; packed if no earlier run did."""
    return layers.stored(
        "pack user space",
        plan.userspace,
        lambda: entries(tree, plan.cell.arch),
        cache,
        report,
    )


def entries(tree: Path, arch: Arch) -> Iterator[Entry]:
    """What the layer has."""
    for placed in selection(tree, arch):
        path = f"{paths.DRIVER_ROOT}/{placed.dest}"
        if placed.target is not None:
            yield Entry(path, "symlink", target=placed.target)
        else:
            yield Entry(path, "file", placed.mode, tree / str(placed.source))
