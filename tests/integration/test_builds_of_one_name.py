"""Two releases whose kernels have one name but are different builds: one image, with a module set for each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from builds import layers, matrix, oci, pipeline
from builds.errors import ConfigurationError
from builds.layers import Entry
from builds.model import Arch, ModuleType
from builds.oci import Image
from builds.pipeline import Run
from builds.rootfs import open_rootfs

from .conftest import Built, environment

MATRIX = """\
inputs: upstream
os_tag: "gardenlinux0"
alias: "gardenlinux{gl}"
base: {amd64: "1877.8"}
drivers: [{version: "550.163.01"}]
releases:
  - {gl: "1877.8", kernel: "6.1.0-1gl0", arch: [amd64], flavor: [cloud]}
  - {gl: "1877.9", kernel: "6.1.0-1gl1", arch: [amd64], flavor: [cloud]}
  - {gl: "1877.10", kernel: "6.1.0-1gl1", arch: [amd64], flavor: [cloud]}
exclude:
  - {driver: "==550.*", module_type: open, reason: "one type is enough for what is tested here"}
"""


def _rebuilt(built: Built, layout: Path) -> list[Entry]:
    """What differs in a kmodbuild image whose kernel was built anew: a setting, and the package's version."""
    folder, build = built.set.kernel.output.lstrip("/"), built.set.kernel.build
    with open_rootfs(built.kmodbuild, layout) as rootfs:
        config = rootfs.read(f"{folder}/.config") + b"# built anew\n"
        status = rootfs.read("var/lib/dpkg/status").decode()
    section = f"Version: {build.package}\n"
    assert section in status
    return [
        Entry(f"{folder}/.config", "file", 0o644, config),
        Entry("var/lib/dpkg/status", "file", 0o644, status.replace(section, f"Version: {build.package}.1\n").encode()),
    ]


def _lay(image: Image, layout: Path, names: list[str], more: list[Entry]) -> None:
    """Put an image into a layout, with a layer on top if there is more."""
    oci.create(layout)
    stack = list(image.layers)
    for layer in stack:
        blob = oci.blob_path(layout, layer.descriptor.digest)
        if not blob.exists():
            os.link(oci.blob_path(image.layout, layer.descriptor.digest), blob)
    if more:
        layer = layers.write_layer(more, layout / "layer")
        (layout / "layer").rename(oci.blob_path(layout, layer.descriptor.digest))
        stack.append(layer)
    oci.add_image(layout, stack, arch=Arch.AMD64, names=names)


@pytest.fixture(scope="module")
def runs(built: Built, out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """The three cells of a matrix, as they are built with the inputs of the default cell."""
    folder = tmp_path_factory.mktemp("one-name")
    (folder / "matrix.yaml").write_text(MATRIX)
    of = matrix.load(folder / "matrix.yaml")
    images = folder / "images"
    _lay(built.inputs.base, images, ["1877.8"], [])
    _lay(built.kmodbuild, images / "kmodbuild", ["amd64-1877.8"], [])
    rebuilt = _rebuilt(built, folder)
    for release in ("1877.9", "1877.10"):
        _lay(built.kmodbuild, images / "kmodbuild", [f"amd64-{release}"], rebuilt)
    settings = pipeline.start(built.cell, {"out_dir": str(out)}, built.report).settings
    place = replace(settings, gl_registry=f"oci:{images}", nvidia_base_url=str(built.inputs.package))
    yield {cell.gl: Run(cell, of, place, built.cache, built.report) for cell in of.cells}
    shutil.rmtree(folder)


def test_both_builds_are_in_one_image_and_each_of_its_modules_is_checked_against_its_own_kernel(
    runs: dict[str, Run],
) -> None:
    record = pipeline.verify_cell(runs["1877.9"])
    assert record.passed
    made, _ = pipeline.plan(runs["1877.9"])
    first, second = made.sets
    assert (first.releases, second.releases) == (("1877.8",), ("1877.9", "1877.10"))
    assert first.kernel.build.release == second.kernel.build.release
    assert second.kernel.build.package == f"{first.kernel.build.package}.1"
    checked = {check.object for check in record.checks if check.id == "modules.crcs"}
    assert checked == {f"{one.id}/proprietary/{name}.ko" for one in made.sets for name in _names(runs, one.id)}
    aliases = {tag.name for tag in made.tags if tag.kind == "alias"}
    assert aliases == {f"550-{made.kernel_release}-gardenlinux1877.{patch}" for patch in (8, 9, 10)}


def _names(runs: dict[str, Run], set_id: str) -> set[str]:
    folder = runs["1877.9"].out / "modules" / set_id / ModuleType.PROPRIETARY
    return {path.stem for path in folder.glob("*.ko")}


def test_the_image_is_the_same_whichever_of_its_cells_is_built(runs: dict[str, Run]) -> None:
    digests = {pipeline.build(run).digest for run in runs.values()}
    assert len(digests) == 1
    assert len({pipeline.plan(run)[0].image for run in runs.values()}) == 1


def test_the_installer_picks_by_the_running_kernels_build(runs: dict[str, Run], tmp_path: Path) -> None:
    """As `/proc/version` names it; of a build that the image does not know it says so."""
    made, _ = pipeline.plan(runs["1877.9"])
    image = pipeline.build(runs["1877.9"])
    with open_rootfs(image, tmp_path) as rootfs:
        script = rootfs.read("opt/nvidia/installer/choose.sh")
        for node in rootfs.below("opt/nvidia/modules"):
            if node.path.endswith(("/release", "/package")):
                target = tmp_path / "image" / node.path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(node.read())
    (tmp_path / "choose.sh").write_bytes(script)

    def choose(package: str) -> subprocess.CompletedProcess[str]:
        version = f"Linux version {made.kernel_release} (somebody@somewhere) #1 SMP Debian {package} (2026-01-01)"
        pick = '. "$1/choose.sh" && choose_set "$1/image/opt/nvidia/modules" "$2" "$3"'
        return subprocess.run(
            ["sh", "-c", pick, "sh", str(tmp_path), made.kernel_release, version],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    for one in made.sets:
        assert choose(one.kernel.build.package).stdout.strip().endswith(f"/{one.id}")
    refused = choose("6.1.1-1")
    assert refused.returncode != 0
    assert "no modules for this build of kernel" in refused.stdout


def test_a_release_that_is_missing_from_a_mirror_is_named_with_the_reason(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["1877.8"]
    images = Path(run.settings.gl_registry.removeprefix("oci:"))
    shutil.copytree(images, tmp_path / "images", copy_function=os.link)
    index = tmp_path / "images" / "kmodbuild" / "index.json"
    text = index.read_text().replace('"amd64-1877.9"', '"amd64-gone"')
    index.unlink()
    index.write_text(text)
    alone = replace(run, settings=replace(run.settings, gl_registry=f"oci:{tmp_path / 'images'}"))
    with pytest.raises(ConfigurationError, match=r"amd64-1877\.9") as caught:
        pipeline.plan(alone)
    assert caught.value.hint
    assert "the kernels of 1877.9 and 1877.8 have one name" in caught.value.hint
