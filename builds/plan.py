"""The plan of a cell: everything it depends on, with digests, and the key of each step's output.

A key is made of just what its step depends on, so cells that share a part share its key; no key contains a clock,
a path or the name of a release. The image depends on the kernel build, not on the release that ships it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import components as extras
from . import kernel as kernels
from . import oci, recipes, sources, tags
from .cache import Cache, key_of
from .console import Reporter
from .errors import ConfigurationError, ExcludedError
from .kernel import Kernel
from .matrix import Matrix
from .model import Cell, ModuleType
from .settings import Settings
from .sources import Checksum
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
    checksum: Checksum = Checksum.OWN
    """Who says that it has to have these bytes."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> InputPackage:
        """Read a package back."""
        return cls(**{**document, "checksum": Checksum(document["checksum"])})


@dataclass(frozen=True)
class InputComponent:
    """A component that a cell is made from besides the driver package."""

    version: str
    sha256: str
    """Of its archive."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Shipped:
    """The kernel of one release, as its kmodbuild image has it."""

    gl: str
    kernel: Kernel
    kmodbuild: InputImage


@dataclass(frozen=True)
class ModuleSet:
    """The modules for one kernel build."""

    releases: tuple[str, ...]
    """Garden Linux releases that ship the build, oldest first."""
    kernel: Kernel
    kmodbuild: InputImage
    """Where the modules are compiled: the newest release's, where several ship the build."""
    modules: Mapping[ModuleType, str]
    """Key of the modules of each type that is built."""
    absent: Mapping[ModuleType, str]
    """Reason why a type is not built: the rule that excludes it."""

    @property
    def id(self) -> str:
        """Name of the set: its folder in an image, and in ``out/<cell>/modules``."""
        return self.kernel.build.id

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModuleSet:
        """Read a set back."""
        return cls(
            releases=tuple(document["releases"]),
            kernel=kernels.from_json(document["kernel"]),
            kmodbuild=InputImage(**document["kmodbuild"]),
            modules={ModuleType(name): key for name, key in document["modules"].items()},
            absent={ModuleType(name): reason for name, reason in document["absent"].items()},
        )


@dataclass(frozen=True)
class Plan:
    """What one cell will be made of and what it will be called. The same on every machine."""

    cell: Cell
    sets: tuple[ModuleSet, ...]
    """One for each kernel build of the cell's kernel name; the installer picks by the running kernel's build."""
    base: InputImage
    package: InputPackage
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
    components: Mapping[str, InputComponent] = field(default_factory=dict)
    """Fabric manager and the like, by name."""
    components_absent: Mapping[str, str] = field(default_factory=dict)
    """Reason why a component is not there: what its source, or the setting, says."""

    @property
    def kernel_release(self) -> str:
        """The kernel's release name, which all sets share."""
        return self.sets[0].kernel.build.release

    @property
    def types(self) -> tuple[ModuleType, ...]:
        """The module types that the image has, for one kernel build at least."""
        return tuple(sorted({module_type for one in self.sets for module_type in one.modules}))

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
            sets=tuple(map(ModuleSet.from_json, document["sets"])),
            base=InputImage(**document["base"]),
            package=InputPackage.from_json(document["package"]),
            userspace=document["userspace"],
            image=document["image"],
            image_path=document["image_path"],
            os_tag=document["os_tag"],
            addressable=document["addressable"],
            tags=tuple(Tag(TagKind(tag["kind"]), tag["name"]) for tag in document["tags"]),
            components={name: InputComponent(**one) for name, one in document["components"].items()},
            components_absent=dict(document["components_absent"]),
        )


@dataclass(frozen=True)
class SetInputs:
    """The inputs of one module set as they lie on this machine."""

    kmodbuild: oci.Image
    symvers: Path
    """``Module.symvers`` of the kernel."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a plan as they lie on this machine."""

    sets: Mapping[str, SetInputs]
    """By the id of the module set."""
    base: oci.Image
    package: Path
    components: Mapping[str, Path]
    """The unpacked archives, by name."""


def resolve(cell: Cell, matrix: Matrix, settings: Settings, cache: Cache, report: Reporter) -> tuple[Plan, Inputs]:
    """Resolve a cell's inputs and plan it, together with the cells whose image is the same.

    Raises ExcludedError where rules exclude the whole cell.
    """
    base_ref = f"{settings.gl_registry}:{matrix.base[cell.arch]}"
    base = sources.image(base_ref, cell.arch, cache, report)
    package = sources.driver_package(
        settings.nvidia_base_url,
        cell.driver,
        cell.arch,
        matrix.pins.get((cell.driver, cell.arch)),
        cache,
        report,
        vouched=settings.vouched,
    )
    more = extras.resolve(settings.nvidia_redist_url, cell.driver, cell.arch, cache, report)
    shipped, inputs = _kernels(cell, matrix, settings, cache, report)
    plan = make(
        cell,
        matrix,
        shipped=shipped,
        base=InputImage(_public(base_ref, settings), base.digest),
        package=InputPackage(package.name, package.sha256, package.size, package.checksum),
        components={name: InputComponent(one.version, one.sha256, one.size) for name, one in more.listed.items()},
        components_absent=more.absent,
        image_path=settings.image_path,
    )
    return plan, Inputs({one.id: inputs[one.releases[-1]] for one in plan.sets}, base, package.path, more.trees)


def _kernels(
    cell: Cell, matrix: Matrix, settings: Settings, cache: Cache, report: Reporter
) -> tuple[list[Shipped], dict[str, SetInputs]]:
    """The kernels of a cell and of those that the matrix expects to have a kernel of the same name."""
    shipped, inputs = [], {}
    for sibling in matrix.siblings(cell):
        reference = f"{settings.gl_registry}/kmodbuild:{sibling.arch}-{sibling.gl}"
        try:
            image = sources.kmodbuild(reference, sibling.arch, cache, report)
        except ConfigurationError as error:
            if sibling == cell:
                raise
            if matrix.release(sibling).kernel == matrix.release(cell).kernel:
                report.say(f"  {sibling.gl}: no kmodbuild image; by the matrix its kernel is that of {cell.gl}")
                continue
            error.hint = f"in the matrix the kernels of {sibling.gl} and {cell.gl} have one name: one image for both"
            raise
        facts = kernels.facts(image, sibling, cache, report)
        shipped.append(Shipped(sibling.gl, facts.kernel, InputImage(_public(reference, settings), image.digest)))
        inputs[sibling.gl] = SetInputs(image, facts.symvers)
    return shipped, inputs


def make(
    cell: Cell,
    matrix: Matrix,
    *,
    shipped: Sequence[Shipped],
    base: InputImage,
    package: InputPackage,
    image_path: str,
    components: Mapping[str, InputComponent] | None = None,
    components_absent: Mapping[str, str] | None = None,
) -> Plan:
    """Plan a cell whose inputs are known: rules, keys, tags.

    ``shipped`` are the kernels of the cell's own release and of others, oldest release first; those that do not have
    its name are left out. Raises ExcludedError for a cell of which nothing is left.
    """
    release = next(one.kernel.build.release for one in shipped if one.gl == cell.gl)
    sets = _sets(cell, matrix, [one for one in shipped if one.kernel.build.release == release], package)
    if not any(one.modules for one in sets):
        reasons = {f"{name}: {reason}" for one in sets for name, reason in one.absent.items()}
        raise ExcludedError(f"cell {cell}", "is excluded by rules", got="; ".join(sorted(reasons)))
    components = components or {}
    userspace = key_of(
        package=package.sha256,
        components={name: one.sha256 for name, one in components.items()},
        arch=cell.arch,
        recipe=recipes.USER_SPACE,
    )
    image = key_of(
        base=base.digest,
        userspace=userspace,
        sets={one.id: {"modules": one.modules, "absent": one.absent, "drm": one.kernel.drm} for one in sets},
        recipe=recipes.IMAGE,
    )
    os_tag = matrix.release(cell).os_tag
    return Plan(
        cell=cell,
        sets=sets,
        base=base,
        package=package,
        userspace=userspace,
        image=image,
        image_path=image_path,
        os_tag=os_tag,
        addressable=tags.addressable(cell, release, os_tag),
        tags=tags.compute(
            cell,
            release,
            os_tag=os_tag,
            aliases=[matrix.alias.format(gl=gl) for one in sets for gl in one.releases],
            owns_branch=matrix.owns_branch(cell),
            key=image,
        ),
        components=components,
        components_absent=components_absent or {},
    )


def again(made: Plan, matrix: Matrix) -> Plan:
    """A plan made anew from what an earlier one was made from: by these rules, and by the code that is here.

    Raises ExcludedError where rules leave nothing of it any more.
    """
    return make(
        made.cell,
        matrix,
        shipped=[Shipped(gl, one.kernel, one.kmodbuild) for one in made.sets for gl in one.releases],
        base=made.base,
        package=made.package,
        image_path=made.image_path,
        components=made.components,
        components_absent=made.components_absent,
    )


def _sets(cell: Cell, matrix: Matrix, shipped: Sequence[Shipped], package: InputPackage) -> tuple[ModuleSet, ...]:
    """The module sets of kernels of one name: one for each build, in the order of the releases."""
    builds: dict[str, list[Shipped]] = {}
    for one in shipped:
        builds.setdefault(one.kernel.build.id, []).append(one)
    return tuple(_set(cell, matrix, same, package) for same in builds.values())


def _set(cell: Cell, matrix: Matrix, same: Sequence[Shipped], package: InputPackage) -> ModuleSet:
    kernel = same[-1].kernel
    absent = {rule.module_type: rule.reason for rule in matrix.rules if rule.applies(cell.driver, kernel.build.version)}
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
    return ModuleSet(tuple(one.gl for one in same), kernel, same[-1].kmodbuild, modules, absent)


def _public(reference: str, settings: Settings) -> str:
    """A reference as a plan may show it: folders of this machine are nobody else's business."""
    if reference.startswith("oci:"):
        return f"oci:{reference.removeprefix(settings.gl_registry).lstrip('/:')}"
    return reference
