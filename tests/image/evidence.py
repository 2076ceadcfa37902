"""Where the checks get their facts: what is expected, from plan and inputs, and what is found, from the image."""

from __future__ import annotations

import functools
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import zstandard

from builds import image as packing
from builds import kmod, layers, oci, paths, recipes, userspace
from builds.cache import CHUNK
from builds.components import COMPONENTS, Component
from builds.errors import BuildError
from builds.kmod import Elf, Export, Module
from builds.loading import Control
from builds.manifest import Placed
from builds.model import MODULES, ModuleType
from builds.plan import ModuleSet, Plan
from builds.rootfs import Node, RootFs
from builds.verify import Subject

UNREADABLE = (tarfile.TarError, zstandard.ZstdError, zlib.error, EOFError, OSError)
"""What a damaged layer makes its readers raise."""

_X11 = "VDPAU decodes for an X client, which brings X11 itself"
_INFINIBAND = "only systems with NVLink 5 run it, and those need InfiniBand's userland in the base image"
_MAY_LACK = {
    ("libvdpau_nvidia.so.*", "libX11.so.6"): _X11,
    ("libvdpau_nvidia.so.*", "libXext.so.6"): _X11,
    ("nvlsm", "libibumad.so.3"): _INFINIBAND,
    ("nvlsm", "libibmad.so.5"): _INFINIBAND,
    ("nvlsm", "libibverbs.so.1"): _INFINIBAND,
}
"""Libraries that may be missing, by who needs them, and why that is no defect."""


@dataclass(frozen=True)
class InSet:
    """Something in a module set."""

    set: ModuleSet

    @property
    def inner(self) -> str:
        """Its path in the set's folder."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.set.id}/{self.inner}"

    @property
    def path(self) -> str:
        """Its path in an image."""
        return f"{paths.MODULES}/{self}"


@dataclass(frozen=True)
class ModuleRef(InSet):
    """One module that the plan demands."""

    type: ModuleType
    name: str

    @property
    def inner(self) -> str:
        """Type, and file."""
        return f"{self.type}/{self.name}.ko"


@dataclass(frozen=True)
class TypeRef(InSet):
    """One type, to be there or not."""

    type: ModuleType

    @property
    def inner(self) -> str:
        """Its folder."""
        return self.type


@dataclass(frozen=True)
class FactRef(InSet):
    """One fact by which the installer finds the set."""

    name: str

    @property
    def inner(self) -> str:
        """Its file."""
        return self.name


@dataclass(frozen=True)
class ControlRef(InSet):
    """A module that the kernel must refuse."""

    control: Control

    @property
    def inner(self) -> str:
        """What is wrong with it."""
        return self.control


@dataclass(frozen=True)
class InstallerPart:
    """One file of the installer: where it is in an image, and what it is."""

    dest: str
    mode: int
    data: bytes


class Expected:
    """What an image must hold: by its plan, the driver package and the kernel, never by the image."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.plan: Plan = subject.plan

    @functools.cached_property
    def modules(self) -> tuple[ModuleRef, ...]:
        """Five modules of every type that is built, for each kernel build."""
        return tuple(
            ModuleRef(one, kind, name) for one in self.plan.sets for kind in sorted(one.modules) for name in MODULES
        )

    @functools.cached_property
    def module_types(self) -> tuple[TypeRef, ...]:
        """Every type of each kernel build, whether it is built or not."""
        return tuple(TypeRef(one, kind) for one in self.plan.sets for kind in ModuleType)

    @functools.cached_property
    def loads(self) -> tuple[TypeRef, ...]:
        """Every type that is built, for each kernel build."""
        return tuple(one for one in self.module_types if one.type in one.set.modules)

    @functools.cached_property
    def controls(self) -> tuple[ControlRef, ...]:
        """What each kernel build must refuse."""
        return tuple(
            ControlRef(one, control)
            for one in self.plan.sets
            for control in Control
            if one.kernel.build.modversions or control is not Control.CRC
        )

    @functools.cached_property
    def facts(self) -> tuple[FactRef, ...]:
        """What the installer tells module sets apart by."""
        return tuple(FactRef(one, name) for one in self.plan.sets for name in ("release", "package"))

    @functools.cached_property
    def placed(self) -> tuple[Placed, ...]:
        """Files and links of the driver root."""
        return userspace.selection(self.subject.tree, self.subject.components, self.plan.cell.arch)

    @functools.cached_property
    def files(self) -> tuple[Placed, ...]:
        """Files of the driver root."""
        return tuple(one for one in self.placed if one.source is not None)

    @functools.cached_property
    def links(self) -> tuple[Placed, ...]:
        """Symlinks of the driver root."""
        return tuple(one for one in self.placed if one.target is not None)

    @functools.cached_property
    def elves(self) -> tuple[Placed, ...]:
        """Programs and libraries of the driver root. Firmware is of another machine: the GPU's."""
        return tuple(
            one for one in self.files if not one.dest.startswith("lib/firmware/") and kmod.is_elf(self.head(one))
        )

    @functools.cached_property
    def libraries(self) -> tuple[Placed, ...]:
        """Libraries of the driver root that have a SONAME."""
        return tuple(one for one in self.elves if self.elf(one).soname)

    @functools.cached_property
    def components(self) -> tuple[Component, ...]:
        """Every component that there may be, whether the plan has it or says why it is absent."""
        return COMPONENTS

    @functools.cached_property
    def programs(self) -> tuple[Placed, ...]:
        """The tools: programs and scripts."""
        return tuple(one for one in self.files if one.dest.startswith("usr/bin/"))

    @functools.cached_property
    def installer(self) -> tuple[InstallerPart, ...]:
        """The installer's files: the project's own sources, and the facts that they need, by the plan."""
        plan = self.plan
        facts = f"DRIVER_VERSION={plan.cell.driver}\nTRIPLET={plan.cell.arch.triplet}\n"
        return (
            *(
                InstallerPart(paths.ENTRYPOINT, 0o755, path.read_bytes())
                if path.name == "nvidia-driver"
                else InstallerPart(f"{paths.INSTALLER}/{path.name}", 0o644, path.read_bytes())
                for path in recipes.INSTALLER_PARTS
            ),
            InstallerPart(f"{paths.INSTALLER}/release.env", 0o644, facts.encode()),
        )

    def parts(self, module: Callable[[str, ModuleType, str], bytes]) -> dict[str, str]:
        """Diff id that each of our layers is to have, lowest first; ``module`` is the content of the modules.

        Nothing in a layer is left open but that, so whatever a reader of archives may overlook shows here.
        """
        plan = self.plan
        return {
            "user space": layers.diff_id(userspace.entries(self.subject.tree, self.subject.components, plan.cell.arch)),
            "modules": layers.diff_id(packing.module_entries(plan, module)),
            "installer": layers.diff_id(packing.installer_entries(plan)),
        }

    def source(self, one: Placed) -> Path:
        """The file of the driver package, or of a component's archive, that a file of the driver root is."""
        return userspace.source_of(one, self.subject.tree, self.subject.components)

    def head(self, one: Placed) -> bytes:
        """The first bytes of a file, from where it comes from."""
        with self.source(one).open("rb") as stream:
            return stream.read(4)

    @functools.cache  # noqa: B019  # lives as long as the run
    def elf(self, one: Placed) -> Elf:
        """What a program or library says of itself, from the driver package."""
        return kmod.read_elf(one.dest, self.source(one).read_bytes())

    @functools.cached_property
    def exports(self) -> Mapping[str, Mapping[str, Export]]:
        """What each kernel exports, by module set."""
        return {of: kmod.read_symvers(path) for of, path in self.subject.symvers.items()}


@dataclass
class Found:
    """What an image holds."""

    image: oci.Image
    rootfs: RootFs
    expected: Expected
    _modules: dict[str, Module | BuildError] = field(default_factory=dict)
    _elves: dict[str, Elf] = field(default_factory=dict)

    def file(self, path: str) -> Node:
        """The regular file at a path, itself and not what a link points to. Raises BuildError where there is none."""
        node = self.rootfs.nodes.get(path)
        if node is None or not node.is_file:
            raise BuildError(f"/{path}", "is not a file of the image", got=kind_of(node))
        return node

    def module(self, ref: ModuleRef) -> Module:
        """A module, read once. Raises BuildError where it is missing or damaged, each time."""
        if ref.path not in self._modules:
            try:
                data = self.file(ref.path).read()
                self._modules[ref.path] = kmod.read_module(f"{ref.name}.ko", data)
            except BuildError as error:
                self._modules[ref.path] = error
        module = self._modules[ref.path]
        if isinstance(module, BuildError):
            raise module
        return module

    def siblings(self, ref: ModuleRef) -> dict[str, Module]:
        """The modules of a module's set and type that can be read, by name; what is not has failed by itself."""
        modules: dict[str, Module] = {}
        for name in MODULES:
            try:
                modules[name] = self.module(replace(ref, name=name))
            except BuildError:
                continue
        return modules

    def lent(self, ref: ModuleRef) -> dict[str, Export]:
        """Every symbol that kernel and siblings lend to a module."""
        return kmod.providers(self.expected.exports[ref.set.id], self.siblings(ref), ref.name)

    def elf(self, path: str) -> Elf:
        """A program or library. Raises BuildError where it is missing or damaged."""
        if path not in self._elves:
            self._elves[path] = kmod.read_elf(f"/{path}", self.file(path).read())
        return self._elves[path]

    @property
    def bases(self) -> int:
        """How many of the layers are the base's."""
        return len(self.expected.subject.base)

    def ours(self) -> list[Node]:
        """Everything that the layers above the base bring."""
        return [node for path, node in sorted(self.rootfs.nodes.items()) if node.layer >= self.bases]

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """Diff id that each of our layers is to have, given the modules that the image has."""
        return self.expected.parts(lambda *of: self.file(f"{paths.MODULES}/{'/'.join(of)}.ko").read())

    @functools.cached_property
    def layers(self) -> tuple[LayerFacts, ...]:
        """What each layer holds, whiteouts included. Raises BuildError for one that is no readable tar."""
        return tuple(_layer_facts(self.image, layer) for layer in self.image.layers)

    @property
    def members(self) -> list[tarfile.TarInfo]:
        """Everything that stands in the layers above the base, whiteouts included."""
        return [member for layer in self.layers[self.bases :] for member in layer.members]


@dataclass(frozen=True)
class LayerFacts:
    """One layer as it is stored."""

    descriptor: oci.Descriptor
    diff_id: str
    """Of its bytes, uncompressed."""
    members: tuple[tarfile.TarInfo, ...]


def may_lack(library: str) -> frozenset[str]:
    """Libraries that a library may want in vain."""
    return frozenset(needed for who, needed in _MAY_LACK if fnmatchcase(library, who))


def kind_of(node: Node | None) -> str:
    """What a node is, in a word."""
    if node is None:
        return "nothing"
    return "a file" if node.is_file else "a folder" if node.is_dir else "a link" if node.is_link else "a special file"


def frames(blob: IO[bytes]) -> Iterator[str]:
    """What is odd about a compressed layer: anything but whole streams, one after the other, up to its end.

    Every runtime unpacks those alike. What else a format allows (frames to skip, names, padding, an end that is left
    out) is taken by some and refused by others, and has room for what nobody sees.
    """
    data = blob.read()
    while data:
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            stream: Any = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        elif data.startswith(b"\x1f\x8b"):
            if data[3:8] != bytes(5):
                yield "a gzip stream with a name, a comment or a time"
            stream = zlib.decompressobj(wbits=31)
        else:
            yield f"{len(data)} bytes that are no stream"
            return
        for start in range(0, len(data), CHUNK):
            stream.decompress(data[start : start + CHUNK])
            if stream.eof:
                data = stream.unused_data + data[start + CHUNK :]
                break
        else:
            yield "a stream that has no end"
            return


class _Hashing:
    """A stream that keeps the digest of what was read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.hash = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.hash.update(data)
        return data


def _layer_facts(image: oci.Image, layer: oci.Layer) -> LayerFacts:
    try:
        with oci.open_layer(image.layout, layer.descriptor) as stream:
            hashing: Any = _Hashing(stream)
            with tarfile.open(fileobj=hashing, mode="r|", bufsize=CHUNK) as archive:
                members = tuple(archive)
            while hashing.read(CHUNK):
                pass
    except UNREADABLE as error:
        raise BuildError(f"layer {layer.descriptor.digest}", "cannot be read", got=str(error)) from error
    return LayerFacts(layer.descriptor, f"sha256:{hashing.hash.hexdigest()}", members)
