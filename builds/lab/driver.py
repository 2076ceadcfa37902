"""The lab's driver package: Debian's pieces of the vendor's driver, put back into the vendor's shape.

Debian splits the driver into packages and spreads the files over its own folders; each file goes back to where the
vendor has it, and gets its line in the manifest, by the rules in ``recipes.yaml``.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from posixpath import basename, normpath
from typing import IO

from ..cache import remove
from ..console import Reporter
from ..errors import BuildError
from . import package
from .apt import Package, file_name
from .package import Line
from .recipes import DriverRecipe, Rule, matches

COMMANDS = ("setpriv", "apt-get", "dpkg-deb")


def package_name(recipe: DriverRecipe) -> str:
    """The vendor's name of the package's file."""
    return f"NVIDIA-Linux-{recipe.arch.machine}-{recipe.version}.run"


def check_versions(recipe: DriverRecipe, packages: Sequence[Package]) -> None:
    """Raise BuildError where the archive has packages of another driver version than the recipe's."""
    for one in packages:
        upstream = one.version.rpartition(":")[2].rpartition("-")[0]
        if one.name not in recipe.skewed and upstream != recipe.version:
            raise BuildError(
                f"lab driver package {recipe.version} for {recipe.arch}",
                f"{recipe.suite} has another version of {one.name}",
                got=one.version,
                hint="name the version in builds/lab/recipes.yaml and builds/lab.yaml",
            )


def build(
    recipe: DriverRecipe,
    packages: Sequence[Package],
    pool: Path,
    folder: Path,
    report: Reporter,
) -> None:
    """Write the driver package to ``folder`` under the vendor's name.

    Raises BuildError for a file that no rule places, for two files in one place, and for a damaged package.
    """
    tree = folder / "tree"
    tree.mkdir()
    lines: dict[str, Line] = {}
    with report.bytes(f"unpack {len(packages)} packages", sum(one.size for one in packages)) as advance:
        for one in packages:
            for line in _collect(one, pool / file_name(one), recipe, tree):
                if lines.setdefault(line.path, line) is not line:
                    raise BuildError(one.name, "brings a file that another package brought", got=line.path)
            advance(one.size)
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    with report.bytes("pack the driver tree", size) as advance:
        target = folder / package_name(recipe)
        package.write(tree, recipe.version, recipe.arch, tuple(lines.values()), target, advance, recipe.form)
    remove(tree)


def link_line(path: str, target: str, rule: Rule) -> Line | None:
    """The manifest's line for a symlink of Debian's; None where the vendor has no such link."""
    if rule.link is None:
        return None
    return Line(rule.place(path), 0, rule.link, rule.module, rule.fields, basename(target))


def source_line(path: str) -> Line:
    """The manifest's line for a file of a source tree."""
    kind = "DKMS_CONF" if basename(path) == "dkms.conf" else "KERNEL_MODULE_SRC"
    return Line(path, 0o644, kind, "resman", "INHERIT_PATH_DEPTH:1")


def source_path(member: str, without: Sequence[str]) -> str | None:
    """Path in a source tree of a member of Debian's tarball, which has two folders above; None: left out."""
    parts = normpath(member).split("/", 2)
    if len(parts) < 3 or any(matches(parts[2], pattern) for pattern in without):
        return None
    return parts[2]


def _collect(one: Package, deb: Path, recipe: DriverRecipe, tree: Path) -> Iterator[Line]:
    tarballs = {tarball: folder for folder, tarball in recipe.sources}
    with _members(one, deb) as archive:
        for member in archive:
            path = normpath(member.name)
            if member.isdir():
                continue
            if path in tarballs:
                content = archive.extractfile(member)
                assert content
                yield from _unpack_sources(content, recipe, tree, tarballs[path])
                continue
            try:
                rule = recipe.rule(path)
            except LookupError:
                raise BuildError(
                    f"{one.name} {one.version}",
                    "has a file that the recipe neither places nor ignores",
                    got=path,
                    hint="say in builds/lab/recipes.yaml what it is in the vendor's package",
                ) from None
            if rule is None:
                continue
            if member.issym():
                if line := link_line(path, member.linkname, rule):
                    yield line
            elif rule.type:
                content = archive.extractfile(member)
                assert content
                target = tree / rule.place(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                if rule.gunzip:
                    target.write_bytes(gzip.decompress(content.read()))
                else:
                    _save(content, target)
                yield Line(rule.place(path), int(rule.mode, 8), rule.type, rule.module, rule.fields)


def _unpack_sources(tarball: IO[bytes], recipe: DriverRecipe, tree: Path, folder: str) -> Iterator[Line]:
    with tarfile.open(fileobj=tarball, mode="r|xz") as archive:
        for member in archive:
            path = source_path(member.name, recipe.sources_without)
            if path is None or not member.isfile():
                continue
            content = archive.extractfile(member)
            assert content
            target = tree / folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _save(content, target)
            yield source_line(f"{folder}/{path}")


def _save(content: IO[bytes], target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)


@contextmanager
def _members(one: Package, deb: Path) -> Iterator[tarfile.TarFile]:
    """The files of a package as a stream."""
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "--", "dpkg-deb", "--fsys-tarfile", str(deb)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stderr
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|", bufsize=1 << 20) as archive:
                yield archive
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            process.kill()
            raise BuildError(f"{one.name} {one.version}", "is a damaged package", got=str(error)) from error
        except BaseException:
            process.kill()
            raise
        process.stdout.read()  # to the end, or dpkg-deb is killed by a closed pipe
        if process.wait():
            raise BuildError(
                f"{one.name} {one.version}", "dpkg-deb cannot read it", got=process.stderr.read().decode().strip()
            )
