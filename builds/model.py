"""The words of the project as data: architectures, flavours, module types, cells, kernels.

Everything here is immutable and knows nothing of files, engines or networks; every other module may import it.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from .errors import ConfigurationError


class Arch(enum.StrEnum):
    """A target architecture, by the name that Debian, OCI and Kubernetes share."""

    AMD64 = "amd64"
    ARM64 = "arm64"

    @property
    def machine(self) -> str:
        """The kernel's name for it (``uname -m``), which the vendor uses in package names."""
        return {"amd64": "x86_64", "arm64": "aarch64"}[self.value]

    @property
    def kbuild(self) -> str:
        """``ARCH`` of the kernel's own build files, which the vendor's take too."""
        return {"amd64": "x86_64", "arm64": "arm64"}[self.value]

    @property
    def triplet(self) -> str:
        """Debian's multiarch triplet: the last part of the library folder's path."""
        return f"{self.machine}-linux-gnu"

    @property
    def elf_machine(self) -> str:
        """``e_machine`` of its ELF files, as pyelftools spells it."""
        return {"amd64": "EM_X86_64", "arm64": "EM_AARCH64"}[self.value]


class Flavor(enum.StrEnum):
    """A kernel flavour of Garden Linux: the cloud kernel, or the one without ``cloud`` in its name."""

    CLOUD = "cloud"
    BAREMETAL = "baremetal"

    @classmethod
    def parse(cls, text: str) -> Flavor:
        """Read a flavour; ``metal`` is the older name of ``baremetal``. Raises ValueError for any other."""
        return cls("baremetal" if text == "metal" else text)


class ModuleType(enum.StrEnum):
    """Which of the vendor's two source trees a set of modules was compiled from."""

    OPEN = "open"
    PROPRIETARY = "proprietary"

    @property
    def source_folder(self) -> str:
        """Folder of the driver tree with this type's sources."""
        return {"open": "kernel-open", "proprietary": "kernel"}[self.value]


MODULES = ("nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm", "nvidia-peermem")
"""The kernel modules of one type, in the order in which they can be loaded."""

_CELL_ID = re.compile(
    r"(?P<driver>\d+(?:\.\d+)+)-(?P<gl>[A-Za-z0-9][A-Za-z0-9._]*)-(?P<arch>amd64|arm64)-(?P<flavor>cloud|baremetal|metal)"
)


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the matrix: driver x Garden Linux release x architecture x kernel flavour."""

    driver: str
    gl: str
    arch: Arch
    flavor: Flavor

    @property
    def id(self) -> str:
        """The name of the cell in sessions, folders and reports: ``570.172.08-1877.3-amd64-cloud``."""
        return f"{self.driver}-{self.gl}-{self.arch}-{self.flavor}"

    @property
    def driver_major(self) -> str:
        """The driver branch: what ``driver.version`` of the GPU Operator names."""
        return self.driver.split(".", 1)[0]

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read a cell id. Raises ConfigurationError where it is not one."""
        found = _CELL_ID.fullmatch(text)
        if not found:
            raise ConfigurationError(
                "cell",
                "is not a cell id <driver>-<gl>-<arch>-<flavor>",
                got=repr(text),
                hint="a cell id looks like 570.172.08-1877.3-amd64-cloud",
            )
        return cls(found["driver"], found["gl"], Arch(found["arch"]), Flavor.parse(found["flavor"]))

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class KernelBuild:
    """One build of a kernel, as read from the headers in a kmodbuild image.

    Two Garden Linux releases can share a release name with different builds; package and digest tell them apart.
    """

    release: str
    """``uname -r`` of the running kernel, such as ``6.12.44-cloud-amd64``."""
    version: str
    """Upstream version from ``version.h``, such as ``6.12.44``: what exclusion rules are keyed on."""
    package: str
    """Version of the package that brought the headers; ``/proc/version`` of the kernel names it."""
    digest: str
    """sha256 over its ``Module.symvers`` and its configuration."""
    modversions: bool
    """Whether the kernel checks symbol CRCs (``CONFIG_MODVERSIONS``)."""

    @property
    def id(self) -> str:
        """Short name of the build: folder of its modules in an image."""
        return f"{self.release}-{self.digest[:12]}"
