"""An arm64 image, made on whatever machine the tests run on: cross-compiled where that is not arm64."""

from __future__ import annotations

from pathlib import Path

import pytest

from builds import kmod, paths, verify
from builds.model import Arch, Cell, ModuleType
from builds.record import Record
from builds.rootfs import open_rootfs

from .conftest import Built, Cli, build

CELL = Cell.parse("550.163.01-debian12-arm64-cloud")


@pytest.fixture(scope="module")
def arm64(out: Path) -> Built:
    """The arm64 cell, built."""
    return build(CELL, out)


def test_it_is_built_by_no_emulated_compiler_and_verified(arm64: Built, builds: Cli) -> None:
    """What can be read is read, what must run runs: emulated, where the machine is of another architecture."""
    tools = Arch(arm64.kmodbuild.config["architecture"])
    assert tools is Arch.AMD64
    assert arm64.set.kernel.cross == "aarch64-linux-gnu-"
    done = builds("verify", str(CELL))
    assert done.returncode == 0, done.stderr + done.stdout
    record = Record.read(arm64.out / "record.json")
    assert record.passed
    assert {check.outcome for check in record.checks} == {"passed"}
    assert {check.group for check in record.checks} >= {"modules", "runtime", "load"}
    assert verify.not_loaded(record) is None


def test_everything_in_it_is_of_its_architecture(arm64: Built, tmp_path: Path) -> None:
    """Held against the files themselves, beside what the checks say."""
    assert arm64.image.config["architecture"] == "arm64"
    assert arm64.plan.types == tuple(sorted(ModuleType))
    assert "550-6.1.0-50-cloud-arm64-debian12" in {tag.name for tag in arm64.plan.tags}
    with open_rootfs(arm64.image, tmp_path) as rootfs:
        machines = {
            node.path: kmod.read_elf(node.path, data).machine
            for node in rootfs.below("opt/nvidia")
            if node.is_file and "/firmware/" not in node.path and kmod.is_elf((data := node.read())[:4])
        }
        assert rootfs.resolve(f"{paths.DRIVER_ROOT}/usr/lib/aarch64-linux-gnu/libnvidia-ml.so.1")
        assert not list(rootfs.below(f"{paths.DRIVER_ROOT}/usr/lib/x86_64-linux-gnu"))
    assert len(machines) > 20
    assert set(machines.values()) == {"EM_AARCH64"}


def test_cells_of_one_release_share_no_more_than_they_may(arm64: Built, built: Built) -> None:
    mine, others = ({layer.descriptor.digest for layer in of.image.layers} for of in (arm64, built))
    assert not mine & others
