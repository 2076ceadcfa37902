"""What the lab's inputs are made of, read from ``recipes.yaml``.

A release or driver that the file does not know is a configuration error, and the known ones are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from posixpath import basename
from typing import Any, Literal

import yaml

from ..errors import ConfigurationError
from ..model import Arch, Flavor
from .package import Form

FILE = Path(__file__).with_name("recipes.yaml")

ImageKind = Literal["kmodbuild", "base"]


@dataclass(frozen=True)
class ImageRecipe:
    """What an image is made of."""

    kind: ImageKind
    gl: str
    arch: Arch
    """Of the cells that it is for."""
    runs_on: Arch
    """Of its own programs: of a kmodbuild image that cross-compiles another one than ``arch``."""
    suite: str
    components: tuple[str, ...]
    packages: tuple[str, ...]
    """Packages beside the essential ones, without their dependencies, as :class:`.apt.Archive` names them."""
    headers: tuple[str, ...]
    """Packages of ``arch`` that bring the kernels' headers, where that is not the image's own architecture."""
    excludes: tuple[str, ...]
    """Options of dpkg that leave paths out."""

    @property
    def suites(self) -> tuple[str, ...]:
        """The suites that the packages come from; the release's own is the first."""
        named = {suite for name in (*self.packages, *self.headers) if (suite := name.partition("/")[2])}
        return (self.suite, *sorted(named - {self.suite}))


@dataclass(frozen=True)
class Rule:
    """What one of Debian's files is in the vendor's package: the parts of its line in the manifest."""

    match: tuple[str, ...]
    module: str
    type: str | None = None
    """Type of a file; None where the rule is about links only."""
    link: str | None = None
    """Type of a symlink; None where the vendor has none: the link is left out."""
    fields: str = ""
    """What stands between type and module."""
    mode: str = "0644"
    to: str = ""
    """Folder in the package, which is the top by default."""
    rename: str | None = None
    gunzip: bool = False

    def place(self, path: str) -> str:
        """Where a file of Debian's goes in the package."""
        name = self.rename or basename(path)
        return f"{self.to}/{name}" if self.to else name


@dataclass(frozen=True)
class DriverRecipe:
    """What a driver package is made of."""

    version: str
    arch: Arch
    suite: str
    components: tuple[str, ...]
    packages: tuple[str, ...]
    """Packages of the driver's own version."""
    skewed: tuple[str, ...]
    """Packages whose version is another."""
    sources: tuple[tuple[str, str], ...]
    """Folders of the package with the tarballs that unpack to them."""
    sources_without: tuple[str, ...]
    """Patterns of files that the tarballs have and the vendor's folders have not."""
    form: Form
    """How the package is made around its content."""
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]

    def rule(self, path: str) -> Rule | None:
        """The rule for one of Debian's files, or None where the file is ignored. Raises LookupError for neither."""
        for rule in self.rules:
            if any(matches(path, pattern) for pattern in rule.match):
                return rule
        if any(matches(path, pattern) for pattern in self.ignored):
            return None
        raise LookupError(path)


@dataclass(frozen=True)
class KernelRecipe:
    """Which package has the kernel of a release, where its kmodbuild image has it not."""

    gl: str
    arch: Arch
    flavor: Flavor
    suite: str
    components: tuple[str, ...]
    package: str
    """Package that depends on the newest kernel's, as :class:`.apt.Archive` names it."""

    @property
    def suites(self) -> tuple[str, ...]:
        """The suites that it comes from; the release's own is the first."""
        return tuple(dict.fromkeys((self.suite, self.package.partition("/")[2] or self.suite)))


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern means a path: the whole of it if it has a slash, else its name."""
    return fnmatchcase(path if "/" in pattern else basename(path), pattern)


def image(kind: ImageKind, gl: str, arch: Arch) -> ImageRecipe:
    """The recipe of a release's kmodbuild or base image. Raises ConfigurationError for an unknown one."""
    data = _data()
    subject = f"lab {kind} image {arch}-{gl}"
    release = _known(data["releases"], gl, "release", subject)
    entry = _known(_known(release, kind, "image", subject), str(arch), "architecture", subject)
    return ImageRecipe(
        kind=kind,
        gl=gl,
        arch=arch,
        runs_on=Arch(entry.get("runs_on", arch)),
        suite=release["suite"],
        components=tuple(data["components"]),
        packages=tuple(entry["packages"]),
        headers=tuple(entry.get("headers", ())),
        excludes=tuple(data["excludes"]),
    )


def driver(version: str, arch: Arch) -> DriverRecipe:
    """The recipe of a driver package. Raises ConfigurationError for an unknown one."""
    data = _data()
    subject = f"lab driver package {version} for {arch}"
    entry = _known(data["drivers"], version, "driver version", subject)
    only = _known(entry["only"], str(arch), "architecture", subject)
    return DriverRecipe(
        version=version,
        arch=arch,
        suite=entry["suite"],
        components=tuple(data["components"]),
        packages=(*entry["packages"], *only),
        skewed=tuple(entry["skewed"]),
        sources=tuple(sorted(entry["sources"].items())),
        sources_without=tuple(data["sources_without"]),
        form=Form(**entry["form"]),
        rules=tuple(_rule(line) for line in data["files"]),
        ignored=tuple(data["ignored"]),
    )


def kernel(gl: str, arch: Arch, flavor: Flavor) -> KernelRecipe | None:
    """The recipe of a release's kernel; None where its kmodbuild image has the kernel, too."""
    data = _data()
    entry = image("kmodbuild", gl, arch)
    package = data["releases"][gl]["kmodbuild"][str(arch)].get("kernels", {}).get(str(flavor))
    return package and KernelRecipe(gl, arch, flavor, entry.suite, entry.components, package)


@cache
def _data() -> Mapping[str, Any]:
    data: Mapping[str, Any] = yaml.safe_load(FILE.read_bytes())
    return data


def _known(table: Mapping[str, Any], name: str, what: str, subject: str) -> Any:
    if name not in table:
        raise ConfigurationError(
            subject,
            f"the lab has no recipe for this {what}",
            got=name,
            hint=f"it knows {', '.join(sorted(table))}; see builds/lab/{FILE.name}",
        )
    return table[name]


def _rule(line: Mapping[str, Any]) -> Rule:
    values = {**line, "match": tuple(line["match"])}
    if "as" in values:
        values["rename"] = values.pop("as")
    return Rule(**values)
