"""Image: base, user space, modules and installer packed into an OCI layout.

The bytes depend on the plan alone. Lower layers are the ones that more images share: the base is the same across
an architecture, the user space across a driver, the modules across a kernel build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import layers, oci, paths, recipes
from .cache import Cache, key_of, publish
from .console import Reporter
from .errors import BuildError, ConfigurationError
from .layers import Entry, StoredLayer
from .model import MODULES, ModuleType
from .oci import Image
from .plan import Plan

PREFIX = "io.gardenlinux.nvidia"
"""Prefix of our own labels."""

_DOCKER_LAYERS = {"application/vnd.docker.image.rootfs.diff.tar.gzip": oci.LAYER_GZIP}
Compiled = Mapping[str, Mapping[ModuleType, Path]]
"""Folders of compiled modules, by module set and type."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def labels(plan: Plan) -> dict[str, str]:
    """The labels of a plan's image: facts that have no place in a tag.

    Not the Garden Linux release: an image depends on the kernel build, whichever release ships it.
    """
    builds = sorted((one.kernel.build for one in plan.sets), key=lambda build: (build.package, build.digest))
    return {
        "org.opencontainers.image.title": "NVIDIA driver",
        "org.opencontainers.image.description": (
            f"Precompiled NVIDIA {plan.cell.driver} kernel modules for {plan.kernel_release}, run by the GPU Operator"
        ),
        "org.opencontainers.image.version": plan.cell.driver,
        "org.opencontainers.image.vendor": "Garden Linux",
        "org.opencontainers.image.licenses": "LicenseRef-NVIDIA AND Apache-2.0",
        "org.opencontainers.image.base.digest": plan.base.digest,
        f"{PREFIX}.driver-version": plan.cell.driver,
        f"{PREFIX}.kernel": plan.kernel_release,
        f"{PREFIX}.kernel-build": ",".join(build.digest for build in builds),
        f"{PREFIX}.kernel-package": ",".join(build.package for build in builds),
        f"{PREFIX}.module-types": ",".join(plan.types),
        f"{PREFIX}.plan-key": plan.image,
    }


def find(plan: Plan, layout: Path, report: Reporter) -> Image | None:
    """The image of a plan, if an earlier run left it in a layout under the plan's names, and it is whole."""
    if not (layout / "oci-layout").is_file():
        return None
    try:
        found = oci.find_image(layout, plan.names[0], plan.cell.arch)
    except (ConfigurationError, BuildError):  # not there, or damaged: made again
        return None
    made_from = (found.config.get("config") or {}).get("Labels") or {}
    if made_from.get(f"{PREFIX}.plan-key") != plan.image or set(oci.names_of(layout, found.digest)) != set(plan.names):
        return None
    try:
        oci.check_blobs(found)
    except BuildError as error:
        report.say(f"  {error.subject}: {error.fact}: it is made again", style="yellow")
        return None
    return found


def assemble(
    plan: Plan,
    base: Image,
    userspace: StoredLayer,
    modules: Compiled,
    layout: Path,
    cache: Cache,
    report: Reporter,
) -> Image:
    """Write the image of a plan to a layout, replacing an older one; whole or not at all."""
    ours = (userspace, _modules(plan, modules, cache, report), _installer(plan, cache, report))

    def write(folder: Path) -> None:
        oci.create(folder)
        for layer in base.layers:
            oci.add_layer(folder, layer, oci.blob_path(base.layout, layer.descriptor.digest))
        for stored in ours:
            oci.add_layer(folder, stored.layer, stored.blob)
        oci.add_image(
            folder,
            [*map(_as_oci, base.layers), *(stored.layer for stored in ours)],
            arch=plan.cell.arch,
            names=plan.names,
            config=config(plan),
            history=[*("base" for _ in base.layers), "user space", "modules", "installer"],
        )

    with report.step("assemble image") as step:
        publish(layout, write)
        image = oci.find_image(layout, plan.names[0], plan.cell.arch)
        step.note(image.digest[:19])
    return image


def config(plan: Plan) -> dict[str, Any]:
    """How a runtime starts the image: as the GPU Operator does, ``nvidia-driver init``."""
    root = f"/{paths.DRIVER_ROOT}"
    return {
        "Entrypoint": [f"/{paths.ENTRYPOINT}"],
        "Cmd": ["init"],
        "Env": [
            f"PATH={_PATH}:{root}/usr/bin",
            # No loader cache to wipe or to go stale: the tools find the libraries by this alone.
            f"LD_LIBRARY_PATH={root}/usr/lib/{plan.cell.arch.triplet}",
        ],
        "Labels": labels(plan),
    }


def _as_oci(layer: oci.Layer) -> oci.Layer:
    """A layer under the name that OCI has for its kind: a base image may come with Docker's."""
    media_type = _DOCKER_LAYERS.get(layer.descriptor.media_type, layer.descriptor.media_type)
    return replace(layer, descriptor=replace(layer.descriptor, media_type=media_type))


def _modules(plan: Plan, made: Compiled, cache: Cache, report: Reporter) -> StoredLayer:
    sets = {one.id: {"modules": one.modules, "absent": one.absent} for one in plan.sets}
    key = key_of(sets=sets, recipe=recipes.MODULE_LAYER)

    def content(set_id: str, module_type: ModuleType, name: str) -> Path:
        return made[set_id][module_type] / f"{name}.ko"

    return layers.stored("pack modules", key, lambda: module_entries(plan, content), cache, report)


def module_entries(plan: Plan, content: Callable[[str, ModuleType, str], Path | bytes]) -> Iterator[Entry]:
    """What the modules' layer has; ``content`` is each module's, by set, type and name."""
    for one in plan.sets:
        folder = f"{paths.MODULES}/{one.id}"
        yield _text(f"{folder}/release", one.kernel.build.release)
        yield _text(f"{folder}/package", one.kernel.build.package)
        for module_type in one.modules:
            for name in MODULES:
                yield Entry(f"{folder}/{module_type}/{name}.ko", "file", 0o644, content(one.id, module_type, name))
        for module_type, reason in one.absent.items():
            yield _text(f"{folder}/{module_type}.absent", reason)


def _installer(plan: Plan, cache: Cache, report: Reporter) -> StoredLayer:
    key = key_of(recipe=recipes.IMAGE, facts=_facts(plan))
    return layers.stored("pack installer", key, lambda: installer_entries(plan), cache, report)


def installer_entries(plan: Plan) -> Iterator[Entry]:
    """What the installer's layer has."""
    entrypoint = recipes.INSTALLER / "nvidia-driver"
    yield Entry(paths.ENTRYPOINT, "file", 0o755, entrypoint)
    for part in sorted(recipes.INSTALLER.rglob("*.sh")):
        yield Entry(f"{paths.INSTALLER}/{part.relative_to(recipes.INSTALLER)}", "file", 0o644, part)
    yield _text(f"{paths.INSTALLER}/release.env", "\n".join(_facts(plan)))


def _facts(plan: Plan) -> Sequence[str]:
    """What the installer must know of the image, as shell assignments."""
    return (f"DRIVER_VERSION={plan.cell.driver}", f"TRIPLET={plan.cell.arch.triplet}")


def _text(path: str, line: str) -> Entry:
    return Entry(path, "file", 0o644, f"{line}\n".encode())
