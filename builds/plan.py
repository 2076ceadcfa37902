"""The plan of a cell: everything it depends on, with digests, and the key of each step's output.

A key is made of just what its step depends on, so cells that share a part share its key; no key contains a clock,
a path or the name of a release. The image depends on the kernel build, not on the release that ships it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import kernel, oci, recipes, sources, tags
from .cache import Cache, key_of
from .console import Reporter
from .errors import ConfigurationError
from .kernel import Kernel
from .matrix import Matrix
from .model import Cell, ModuleType
from .settings import Settings
from .tags import Tag, TagKind


@dataclass(frozen=True)
class InputImage:
    """An image that a cell is made from."""

    reference: str
    digest: str


@dataclass(frozen=True)
class InputPackage:
    """The driver package that a cell is made from."""

    name: str
    sha256: str
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Plan:
    """What one cell will be made of and what it will be called. The same on every machine."""

    cell: Cell
    kernel: Kernel
    kmodbuild: InputImage
    base: InputImage
    package: InputPackage
    modules: Mapping[ModuleType, str]
    """Key of the modules of each type that is built."""
    absent: Mapping[ModuleType, str]
    """Reason why a type is not built: the rule that excludes it."""
    userspace: str
    """Key of the user space."""
    image: str
    """Key of the image."""
    image_path: str
    """Repository of the tags."""
    os_tag: str
    addressable: bool
    """Whether the GPU Operator can compute the image's tag."""
    tags: tuple[Tag, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The image's full names, one per tag."""
        return tuple(f"{self.image_path}:{tag.name}" for tag in self.tags)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON document."""
        return {**asdict(self), "id": self.cell.id}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """Read a plan back."""
        return cls(
            cell=Cell.parse(document["id"]),
            kernel=kernel.from_json(document["kernel"]),
            kmodbuild=InputImage(**document["kmodbuild"]),
            base=InputImage(**document["base"]),
            package=InputPackage(**document["package"]),
            modules={ModuleType(name): key for name, key in document["modules"].items()},
            absent={ModuleType(name): reason for name, reason in document["absent"].items()},
            userspace=document["userspace"],
            image=document["image"],
            image_path=document["image_path"],
            os_tag=document["os_tag"],
            addressable=document["addressable"],
            tags=tuple(Tag(TagKind(tag["kind"]), tag["name"]) for tag in document["tags"]),
        )


@dataclass(frozen=True)
class Inputs:
    """The inputs of a plan as they lie on this machine."""

    kmodbuild: oci.Image
    base: oci.Image
    package: Path
    symvers: Path
    """``Module.symvers`` of the kernel."""


def resolve(cell: Cell, matrix: Matrix, settings: Settings, cache: Cache, report: Reporter) -> tuple[Plan, Inputs]:
    """Resolve a cell's inputs and plan it. Raises ConfigurationError where rules exclude the whole cell."""
    base_gl = matrix.base[cell.arch]
    kmodbuild_ref = f"{settings.gl_registry}/kmodbuild:{cell.arch}-{cell.gl}"
    base_ref = f"{settings.gl_registry}:{base_gl}"
    kmodbuild = sources.kmodbuild(kmodbuild_ref, cell.arch, cache, report)
    base = sources.image(base_ref, cell.arch, cache, report)
    package = sources.driver_package(
        settings.nvidia_base_url, cell.driver, cell.arch, matrix.pins.get((cell.driver, cell.arch)), cache, report
    )
    facts = kernel.facts(kmodbuild, cell, cache, report)
    plan = make(
        cell,
        matrix,
        kernel=facts.kernel,
        kmodbuild=InputImage(_public(kmodbuild_ref, settings), kmodbuild.digest),
        base=InputImage(_public(base_ref, settings), base.digest),
        package=InputPackage(package.name, package.sha256, package.size),
        image_path=settings.image_path,
    )
    return plan, Inputs(kmodbuild, base, package.path, facts.symvers)


def make(
    cell: Cell,
    matrix: Matrix,
    *,
    kernel: Kernel,
    kmodbuild: InputImage,
    base: InputImage,
    package: InputPackage,
    image_path: str,
) -> Plan:
    """Plan a cell whose inputs are known: rules, keys, tags. Raises ConfigurationError for an excluded cell."""
    absent = {rule.module_type: rule.reason for rule in matrix.rules if rule.applies(cell.driver, kernel.build.version)}
    if len(absent) == len(ModuleType):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(absent.items()))
        raise ConfigurationError(f"cell {cell}", "is excluded by rules", got=reasons)
    modules = {
        module_type: key_of(
            package=package.sha256,
            kernel=asdict(kernel.build),
            compiler=kernel.compiler,
            type=module_type,
            recipe=recipes.MODULES,
        )
        for module_type in ModuleType
        if module_type not in absent
    }
    userspace = key_of(package=package.sha256, arch=cell.arch, recipe=recipes.USER_SPACE)
    image = key_of(
        base=base.digest, userspace=userspace, modules=modules, absent=absent, drm=kernel.drm, recipe=recipes.IMAGE
    )
    os_tag = matrix.os_tag_of(cell)
    return Plan(
        cell=cell,
        kernel=kernel,
        kmodbuild=kmodbuild,
        base=base,
        package=package,
        modules=modules,
        absent=absent,
        userspace=userspace,
        image=image,
        image_path=image_path,
        os_tag=os_tag,
        addressable=tags.addressable(cell, kernel.build.release, os_tag),
        tags=tags.compute(
            cell,
            kernel.build.release,
            os_tag=os_tag,
            alias=matrix.alias.format(gl=cell.gl),
            owns_branch=matrix.owns_branch(cell),
            key=image,
        ),
    )


def _public(reference: str, settings: Settings) -> str:
    """A reference as a plan may show it: folders of this machine are nobody else's business."""
    if reference.startswith("oci:"):
        return f"oci:{reference.removeprefix(settings.gl_registry).lstrip('/:')}"
    return reference
