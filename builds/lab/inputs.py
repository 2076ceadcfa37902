"""Makes the pipeline's inputs for the lab's cells, and says which are not there.

Each part is kept under a key of its recipe, our code and the very packages it is made of. A record beside them says
what was made last, so that a later run can tell what is there without asking anybody.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import layers, oci
from ..cache import Cache, file_sha256, key_of, locked, recipe, remove, write_atomically
from ..console import Reporter, Step, human_size
from ..errors import HarnessError, InfrastructureError
from ..model import Arch, Cell
from . import commands, driver, images, package, recipes
from .apt import Archive, Package, file_name
from .images import Contents
from .recipes import DriverRecipe, ImageRecipe, KernelRecipe


def images_root(cache_root: Path) -> Path:
    """The layout of the base images; in it is the layout ``kmodbuild``. What ``GL_REGISTRY`` names after ``oci:``."""
    return cache_root / "lab" / "images"


def packages_root(cache_root: Path) -> Path:
    """The folder of the driver packages, ``<version>/<file>`` each. What ``NVIDIA_BASE_URL`` names."""
    return cache_root / "lab" / "driver"


def kernels_root(cache_root: Path) -> Path:
    """The folder of the kernels' packages, as Debian calls them. What ``KERNEL_IMAGE`` names."""
    return cache_root / "lab" / "kernels"


def missing(cells: Iterable[Cell], bases: Iterable[tuple[str, Arch]], cache: Cache) -> tuple[str, ...]:
    """The inputs of these cells and base images that are not there, or that an older recipe made.

    Asks neither network nor host commands. Raises ConfigurationError for what the lab cannot make.
    """
    return tuple(part.title for part in _parts(cells, bases) if not part.is_current(cache))


def make(cells: Iterable[Cell], bases: Iterable[tuple[str, Arch]], cache: Cache, report: Reporter) -> None:
    """Make the inputs of these cells and base images, where the archive or the recipe has changed since.

    Raises ConfigurationError for what the lab cannot make, InfrastructureError where the host lacks a command or the
    archive cannot be asked for something that is not there, BuildError where the archive's packages do not fit.
    """
    parts = _parts(cells, bases)
    commands.require(sorted({name for part in parts for name in part.commands}))
    folder = cache.root / "lab"
    with locked(folder / "make", lambda: report.say("  another run makes lab inputs; waiting for it …")):
        for left in sorted((folder / "parts").glob("*.part")):
            remove(left)  # by a run that was killed
        unasked: dict[Archive, InfrastructureError] = {}
        for archive in dict.fromkeys(archive for part in parts for archive in part.archives(folder / "apt")):
            with report.step(f"ask Debian's archive about {archive.title}") as step:
                try:
                    archive.update()
                    step.note("lists are up to date")
                except InfrastructureError as error:
                    step.note("it cannot be asked")
                    unasked[archive] = error
        for part in parts:
            archives = part.archives(folder / "apt")
            with report.step(part.title) as step:
                if reason := next((unasked[archive] for archive in archives if archive in unasked), None):
                    if not part.is_current(cache):
                        raise _unreachable(part, reason)
                    step.note("kept as it is")
                    continue
                _make(part, archives, cache, report, step)


@dataclass(frozen=True)
class _Part:
    """One input: an image, a driver package, or a kernel."""

    recipe: ImageRecipe | DriverRecipe | KernelRecipe

    @property
    def slug(self) -> str:
        """Its name in the file system."""
        if isinstance(self.recipe, ImageRecipe):
            return f"{self.recipe.kind}-{self.recipe.arch}-{self.recipe.gl}"
        if isinstance(self.recipe, KernelRecipe):
            return f"kernel-{self.recipe.arch}-{self.recipe.gl}-{self.recipe.flavor}"
        return f"driver-{self.recipe.arch}-{self.recipe.version}"

    @property
    def title(self) -> str:
        """Its name for people."""
        if isinstance(self.recipe, ImageRecipe):
            return f"{self.recipe.kind} image {self.recipe.arch}-{self.recipe.gl}"
        if isinstance(self.recipe, KernelRecipe):
            return f"kernel {self.recipe.arch}-{self.recipe.gl}-{self.recipe.flavor}"
        return f"driver package {self.recipe.version} for {self.recipe.arch}"

    def archives(self, folder: Path) -> tuple[Archive, ...]:
        """The archives that it is resolved with, each with lists below a folder: the first has most of its packages."""
        recipe = self.recipe
        if isinstance(recipe, DriverRecipe):
            wanted: tuple[tuple[tuple[str, ...], Arch], ...] = (((recipe.suite,), recipe.arch),)
        elif isinstance(recipe, KernelRecipe):
            wanted = ((recipe.suites, recipe.arch),)
        else:
            wanted = tuple((recipe.suites, arch) for arch in dict.fromkeys((recipe.runs_on, recipe.arch)))
        return tuple(
            Archive(folder / "-".join((*suites, arch, *recipe.components)), suites, arch, recipe.components)
            for suites, arch in wanted
        )

    @property
    def commands(self) -> tuple[str, ...]:
        """The host's commands that make it."""
        if isinstance(self.recipe, KernelRecipe):
            return ("setpriv", "apt-get")
        return images.COMMANDS if isinstance(self.recipe, ImageRecipe) else driver.COMMANDS

    @property
    def code(self) -> str:
        """Version of our own side of it: recipe and code."""
        if isinstance(self.recipe, KernelRecipe):
            return key_of(recipe=asdict(self.recipe))
        if isinstance(self.recipe, ImageRecipe):
            files, compressor = (images.__file__, oci.__file__), layers.COMPRESSOR
        else:
            files, compressor = (driver.__file__, package.__file__), package.COMPRESSOR
        return key_of(recipe=asdict(self.recipe), code=recipe(*map(Path, files), compressor=compressor))

    def layout(self, cache: Cache) -> tuple[Path, str]:
        """Layout and name of an image."""
        assert isinstance(self.recipe, ImageRecipe)
        root, gl = images_root(cache.root), self.recipe.gl
        return (root / "kmodbuild", f"{self.recipe.arch}-{gl}") if self.recipe.kind == "kmodbuild" else (root, gl)

    def file(self, cache: Cache) -> Path:
        """The file of a driver package."""
        assert isinstance(self.recipe, DriverRecipe)
        return packages_root(cache.root) / self.recipe.version / driver.package_name(self.recipe)

    def record(self, cache: Cache) -> Mapping[str, Any]:
        """What was made last: ``code``, ``key``, ``output``, ``size``, ``packages``; empty if nothing was."""
        try:
            record: Mapping[str, Any] = json.loads(self._record_path(cache).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return record

    def is_current(self, cache: Cache) -> bool:
        """Whether it is there, as our recipe and code make it; whether the archive has news is another matter."""
        record = self.record(cache)
        return record.get("code") == self.code and self._is_there(cache, record)

    def remember(self, cache: Cache, record: Mapping[str, Any]) -> None:
        """Write the record of what was made."""
        write_atomically(self._record_path(cache), json.dumps(record, indent=1) + "\n")

    def _record_path(self, cache: Cache) -> Path:
        return cache.root / "lab" / "made" / f"{self.slug}.json"

    def _is_there(self, cache: Cache, record: Mapping[str, Any]) -> bool:
        if isinstance(self.recipe, DriverRecipe):
            path = self.file(cache)
            return path.is_file() and bool(path.stat().st_size == record["size"])
        if isinstance(self.recipe, KernelRecipe):
            path = kernels_root(cache.root) / str(record["output"])
            return path.is_file() and bool(path.stat().st_size == record["size"])
        layout, name = self.layout(cache)
        try:
            image = oci.find_image(layout, name, self.recipe.runs_on)
        except (HarnessError, OSError, ValueError):  # no layout, or a damaged one
            return False
        blobs = [oci.blob_path(layout, layer.descriptor.digest) for layer in image.layers]
        return image.digest == record["output"] and all(blob.is_file() for blob in blobs)


def _parts(cells: Iterable[Cell], bases: Iterable[tuple[str, Arch]]) -> tuple[_Part, ...]:
    """What these cells and base images need, each once; the first that a build waits for come first."""
    cells = sorted(set(cells))
    wanted: list[ImageRecipe | DriverRecipe | KernelRecipe] = []
    wanted += [recipes.image("kmodbuild", gl, arch) for gl, arch in sorted({(cell.gl, cell.arch) for cell in cells})]
    wanted += [recipes.image("base", gl, arch) for gl, arch in sorted(set(bases))]
    wanted += [recipes.driver(version, arch) for version, arch in sorted({(c.driver, c.arch) for c in cells})]
    kernels = (recipes.kernel(*of) for of in sorted({(cell.gl, cell.arch, cell.flavor) for cell in cells}))
    wanted += [one for one in kernels if one]
    return tuple(map(_Part, wanted))


def _make(part: _Part, archives: Sequence[Archive], cache: Cache, report: Reporter, step: Step) -> None:
    contents = _resolve(part, archives)
    tools = {"mmdebstrap": _mmdebstrap_version()} if isinstance(part.recipe, ImageRecipe) else {}
    key = key_of(code=part.code, packages=[one.identity for one in contents.all], tools=tools)
    before = part.record(cache)
    if before.get("key") == key and part.is_current(cache):
        step.note("up to date")
        return

    def build(folder: Path) -> None:
        pool = cache.root / "lab" / "pool"
        size, number = sum(one.size for one in contents.all), len(contents.all)
        with report.bytes(f"download {number} packages", size) as advance:
            archives[0].download(contents.packages, pool, advance)
            if contents.foreign:
                archives[-1].download(contents.foreign, pool, advance)
        if isinstance(part.recipe, ImageRecipe):
            log = cache.root / "lab" / "logs" / f"{part.slug}.log"
            with report.units("set up packages", number) as advance:
                images.build(part.recipe, contents, pool, folder, log, advance)
        elif isinstance(part.recipe, KernelRecipe):
            for one in contents.packages:
                _link(pool / file_name(one), folder / f"{one.name}_{one.version}_{one.arch}.deb")
        else:
            driver.build(part.recipe, contents.packages, pool, folder, report)

    folder, _ = cache.make("lab/parts", key, build)
    output, size = _publish(part, folder, cache)
    record = {"code": part.code, "key": key, "output": output, "size": size}
    part.remember(cache, {**record, "packages": {one.name: one.version for one in contents.all}})
    if before.get("key") not in (None, key):
        remove(cache.path("lab/parts", before["key"]))
        if isinstance(part.recipe, KernelRecipe) and before["output"] != output:
            remove(kernels_root(cache.root) / before["output"])
    step.note(f"{human_size(size)}, {output[:19]}")


def _resolve(part: _Part, archives: Sequence[Archive]) -> Contents:
    recipe = part.recipe
    if isinstance(recipe, DriverRecipe):
        packages = archives[0].named((*recipe.packages, *recipe.skewed))
        driver.check_versions(recipe, packages)
        return Contents(packages, ())
    if isinstance(recipe, KernelRecipe):
        needed, asked = archives[0].closure((recipe.package,)), recipe.package.partition("/")[0]
        return Contents(tuple(one for one in needed if one.name.startswith("linux-image-") and one.name != asked), ())
    foreign: tuple[Package, ...] = ()
    wanted = recipe.packages
    if recipe.headers:
        needed = archives[-1].closure(recipe.headers)
        foreign = tuple(one for one in needed if one.name.startswith("linux-headers-"))
        # the headers' own tools are programs, which the image's architecture has under the same name
        wanted += tuple(one.name for one in needed if one.name.startswith("linux-kbuild-"))
    return Contents(archives[0].closure(wanted), tuple(name.partition("/")[0] for name in wanted), foreign)


def _publish(part: _Part, folder: Path, cache: Cache) -> tuple[str, int]:
    """Put what was made where the pipeline looks for it; its digest, and its size in bytes."""
    if isinstance(part.recipe, ImageRecipe):
        layout, name = part.layout(cache)
        image = images.add(folder, part.recipe, layout, name)
        return image.digest, image.size
    if isinstance(part.recipe, KernelRecipe):
        (source,) = folder.glob("*.deb")
        target = kernels_root(cache.root) / source.name
        _link(source, target)
        return target.name, target.stat().st_size
    source, target = folder / driver.package_name(part.recipe), part.file(cache)
    _link(source, target)
    return f"sha256:{file_sha256(target)}", target.stat().st_size


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    temporary.replace(target)


def _mmdebstrap_version() -> str:
    return commands.output(["mmdebstrap", "--version"], subject="mmdebstrap").strip()


def _unreachable(part: _Part, error: InfrastructureError) -> InfrastructureError:
    return InfrastructureError(
        part.title,
        "is not there, and the archive that it is made from cannot be asked",
        got=f"{error.subject}: {error.fact}{error.got and ': ' + error.got}",
        hint=error.hint,
        repeat="nox -s lab",
    )
