"""User space: what a data-centre node needs of a driver package besides the modules, and its components, as one layer.

It depends on the driver package, the components and the architecture, never on the kernel, so all images of a driver
share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from . import components, layers, manifest, paths
from .cache import Cache
from .console import Reporter
from .errors import BuildError
from .layers import Entry, StoredLayer
from .manifest import Placed
from .model import Arch
from .plan import Inputs, Plan


def selection(tree: Path, extra: Mapping[str, Path], arch: Arch) -> tuple[Placed, ...]:
    """Files and links of the driver root, by the manifest of a driver tree, SONAME links included.

    ``extra`` are the components' unpacked archives, by name. Raises BuildError for a manifest that is not understood
    or names what the package does not hold, for an archive that is not understood, and for two files of one place.
    """
    try:
        text = (tree / ".manifest").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError("driver package", "has no readable .manifest", got=str(error)) from error
    promised = manifest.parse(text)
    chosen = manifest.select(promised, arch)
    if lacking := manifest.missing(promised, chosen, tree):
        raise BuildError("driver package", "lacks what its manifest promises", got="; ".join(lacking))
    chosen += manifest.soname_links(chosen, tree)
    for component in components.COMPONENTS:
        if component.name in extra:
            more = components.select(extra[component.name], component, arch)
            if twice := {one.dest for one in chosen} & {one.dest for one in more}:
                raise BuildError(component.name, "has files that are there already", got=", ".join(sorted(twice)))
            chosen += more
    return chosen


def source_of(placed: Placed, tree: Path, extra: Mapping[str, Path]) -> Path:
    """The file that a placed one is a copy of."""
    return (extra[placed.component] if placed.component else tree) / str(placed.source)


def layer(plan: Plan, inputs: Inputs, tree: Path, cache: Cache, report: Reporter) -> StoredLayer:
    """The user space as a layer; packed if no earlier run did."""
    return layers.stored(
        "pack user space",
        plan.userspace,
        lambda: entries(tree, inputs.components, plan.cell.arch),
        cache,
        report,
    )


def entries(tree: Path, extra: Mapping[str, Path], arch: Arch) -> Iterator[Entry]:
    """What the layer has."""
    for placed in selection(tree, extra, arch):
        path = f"{paths.DRIVER_ROOT}/{placed.dest}"
        if placed.target is not None:
            yield Entry(path, "symlink", target=placed.target)
        else:
            yield Entry(path, "file", placed.mode, source_of(placed, tree, extra))
