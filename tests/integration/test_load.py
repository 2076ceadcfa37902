"""The image's modules put into their kernel, for real: where the kernel comes from, and what proves nothing.

What must be refused is among the specimens; here is what passes, what is not run, and what ends badly.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builds import compile as compiling
from builds import kernel_image, loading, machine, oci, verify
from builds.cache import Cache
from builds.errors import InfrastructureError
from builds.lab import apt
from builds.loading import LOADED, SPOILED, Answer, Control, Session
from builds.machine import Boot
from builds.model import MODULES, Arch, ModuleType
from builds.oci import Image
from builds.record import CheckResult, Outcome, Record

from .conftest import Built, Cli
from .draft import looping

NOWHERE = "127.0.0.1:1/nothing/here"
"""A repository that does not answer: whoever gets as far as to ask it was let through."""


def load_checks(record: Record) -> list[CheckResult]:
    checks = [check for check in record.checks if check.group == "load"]
    assert {check.id for check in checks} == {name for name in verify.known_checks() if name.startswith("load.")}
    return checks


def own_record(out: Path, built: Built) -> Record:
    return Record.read(out / str(built.cell) / "record.json")


# --- passed


def test_the_modules_of_both_types_load_and_the_record_says_so(verified: Built) -> None:
    record = Record.read(verified.out / "record.json")
    checks = load_checks(record)
    assert {check.outcome for check in checks} == {Outcome.PASSED}
    assert sum(check.seconds for check in checks) > 0
    assert re.fullmatch(r"\d+(\.\d+)+", record.tools["qemu"])
    assert not any(check.required for check in checks)
    named = {check.object.partition("/")[2] for check in checks if check.id == "load.modules"}
    assert named == {f"{kind}/{name}.ko" for kind in ModuleType for name in MODULES}
    controls = {check.object.partition("/")[2]: check.found for check in checks if check.id == "load.controls"}
    assert controls.keys() == set(Control)
    assert "disagrees about version of symbol" in controls[Control.CRC]["kernel"]
    log = (verified.out / "logs" / f"load-{verified.set.id}.log").read_text()
    assert "@@ end" in log


def test_on_a_kernel_with_drm_its_own_modules_come_first_out_of_the_kmodbuild_image(
    built_with_rule: Built, builds: Cli
) -> None:
    of = built_with_rule
    assert of.set.kernel.drm
    done = builds("verify", str(of.cell))
    assert done.returncode == 0, done.stderr
    checks = load_checks(Record.read(of.out / "record.json"))
    assert {check.outcome for check in checks} == {Outcome.PASSED}
    assert not [check for check in checks if "open" in check.object]
    assert kernel_of(of).source == "kmodbuild image"
    log = (of.out / "logs" / f"load-{of.set.id}.log").read_text()
    order = [log.index(f"@@ {step} status 0") for step in ("kernel/drm", "kernel/video", "load/proprietary/nvidia")]
    assert order == sorted(order)


def kernel_of(built: Built) -> kernel_image.KernelImage:
    return loading.prepare(
        built.plan,
        built.set,
        built.inputs,
        built.kernels,
        engine=built.engine,
        cache=built.cache,
        report=built.report,
    ).kernel


def test_a_kernel_alone_does_where_there_is_no_drm(built: Built, builds: Cli, tmp_path: Path) -> None:
    assert not built.set.kernel.drm
    shutil.copyfile(kernel_of(built).vmlinuz, tmp_path / "vmlinuz")
    env = {"OUT_DIR": str(tmp_path / "out"), "KERNEL_IMAGE": str(tmp_path / "vmlinuz")}
    done = builds("verify", str(built.cell), env=env)
    assert done.returncode == 0, done.stderr
    assert {check.outcome for check in load_checks(own_record(tmp_path / "out", built))} == {Outcome.PASSED}


# --- not run


@pytest.fixture
def without_qemu(tmp_path: Path) -> str:
    """A PATH that has every command of this machine's but QEMU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for place in os.environ["PATH"].split(":"):
        for command in Path(place).glob("*") if place else ():
            link = folder / command.name
            if not command.name.startswith("qemu-system-") and not link.is_symlink():
                link.symlink_to(command)
    assert shutil.which("setpriv", path=str(folder))
    return str(folder)


def test_without_qemu_an_image_passes_and_push_says_what_it_lacks(
    built: Built, builds: Cli, without_qemu: str, tmp_path: Path
) -> None:
    env = {"OUT_DIR": str(tmp_path / "out"), "PATH": without_qemu, "IMAGE_PATH": NOWHERE}
    done = builds("verify", str(built.cell), env=env)
    assert done.returncode == 0, done.stderr
    record = own_record(tmp_path / "out", built)
    checks = load_checks(record)
    assert {(check.outcome, check.required) for check in checks} == {(Outcome.NOT_RUN, False)}
    assert {check.message for check in checks} == {
        "virtual machine: this machine has no qemu-system-x86_64; hint: `nox -s setup` installs it"
    }
    assert record.passed
    assert record.tools["qemu"] == "none"

    done = builds("push", str(built.cell), env=env)
    assert done.returncode == 4, done.stderr
    assert "nothing proves that its modules load, which LOAD_TEST demands" in done.stderr
    assert "no qemu-system-x86_64" in done.stderr
    assert "Traceback" not in done.stderr

    done = builds("push", str(built.cell), env={**env, "LOAD_TEST": "optional"})
    assert done.returncode == 5, done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "LOAD_TEST" not in done.stderr


def test_a_package_of_another_kernel_is_a_mistake_and_is_said_at_once(
    built: Built, builds: Cli, tmp_path: Path
) -> None:
    control = tmp_path / "package" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: linux-image-6.1.0-1-cloud-amd64\nVersion: 6.1.4-1\nArchitecture: amd64\n"
        "Maintainer: nobody <nobody@example.com>\nDescription: a kernel that is not there\n"
    )
    package = tmp_path / "kernel.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(control.parents[1]), str(package)],
        check=True,
        capture_output=True,
    )
    env = {"OUT_DIR": str(tmp_path / "out"), "KERNEL_IMAGE": str(package)}
    done = builds("verify", str(built.cell), env=env)
    assert done.returncode == 2, done.stderr
    build = built.set.kernel.build
    assert f"KERNEL_IMAGE {package}: is not the package of the kernel image of {build.release}" in done.stderr
    assert "got linux-image-6.1.0-1-cloud-amd64 6.1.4-1 amd64" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["the kernel of another build", "garbage"])
def test_another_kernel_is_no_verdict(
    what: str, built: Built, built_with_rule: Built, builds: Cli, tmp_path: Path
) -> None:
    """It boots and would refuse every module, or does not boot at all: neither says anything of the image."""
    if what == "garbage":
        (tmp_path / "vmlinuz").write_bytes(b"\xf4" * (1 << 20))
    else:
        shutil.copyfile(kernel_of(built_with_rule).vmlinuz, tmp_path / "vmlinuz")
    env = {"OUT_DIR": str(tmp_path / "out"), "KERNEL_IMAGE": str(tmp_path / "vmlinuz"), "LOAD_TEST": "optional"}
    done = builds("verify", str(built.cell), env=env)
    assert done.returncode == 5, done.stderr
    record = own_record(tmp_path / "out", built)
    checks = load_checks(record)
    assert {(check.outcome, check.required) for check in checks} == {(Outcome.NOT_RUN, True)}
    assert not record.passed
    (why,) = {check.message for check in checks}
    if what == "garbage":
        assert "qemu-system-x86_64: ended with status 1" in why
    else:
        assert f"its kernel is not {built.set.kernel.build.release}" in why
        assert "it came from: file vmlinuz" in why
    done = builds("push", str(built.cell), env={**env, "IMAGE_PATH": NOWHERE})
    assert done.returncode == 4, done.stderr


# --- the package source of a kmodbuild image


@pytest.fixture(scope="module")
def with_apt(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """An image with apt and the sources of Debian that this machine has: what a kmodbuild image needs to be asked."""
    folder = tmp_path_factory.mktemp("with-apt")
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    sources = folder / "sources.list"
    sources.write_text(f"deb {apt.archive_of(targets)} bookworm main\n")
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=apt", "bookworm", str(folder / "image.tar"), str(sources)],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    layout = folder / "layout"
    oci.create(layout)
    layer = oci.add_bytes(layout, (folder / "image.tar").read_bytes(), oci.LAYER_TAR)
    (folder / "image.tar").unlink()
    image = oci.add_image(layout, [oci.Layer(layer, layer.digest)], arch=Arch.AMD64, names=["with-apt"])
    yield image
    built.engine.client.images.remove(f"gardenlinux-nvidia-builds/kmodbuild:{image.digest[7:19]}", force=True)
    shutil.rmtree(folder)


def test_the_package_source_of_the_kmodbuild_image_has_the_kernel(
    built: Built, with_apt: Image, tmp_path: Path
) -> None:
    means: dict[str, Any] = {"engine": built.engine, "cache": Cache(tmp_path), "report": built.report}
    inputs = replace(built.inputs, sets={built.set.id: replace(built.inputs.sets[built.set.id], kmodbuild=with_apt)})
    found = kernel_image.find(built.set, Arch.AMD64, inputs, None, **means)
    assert found.source == "package source of the kmodbuild image"
    assert found.vmlinuz.read_bytes() == kernel_of(built).vmlinuz.read_bytes()
    assert found.closure(["virtio_net"])
    without: dict[str, Any] = {**means, "engine": None}
    assert kernel_image.find(built.set, Arch.AMD64, inputs, None, **without) == found, "it is kept"

    build = replace(built.set.kernel.build, package="6.1.1-99")
    gone = replace(built.set, kernel=replace(built.set.kernel, build=build))
    with pytest.raises(InfrastructureError, match=r"package source does not have it \(E: .*6\.1\.1-99"):
        kernel_image.find(gone, Arch.AMD64, inputs, None, **means)


def test_a_kmodbuild_image_without_apt_has_no_source(built: Built, tmp_path: Path) -> None:
    means: dict[str, Any] = {"engine": built.engine, "cache": Cache(tmp_path), "report": built.report}
    with pytest.raises(InfrastructureError, match="its kmodbuild image has no apt to fetch it with"):
        kernel_image.find(built.set, Arch.AMD64, built.inputs, None, **means)
    assert compiling.load_kmodbuild(built.engine, built.kmodbuild, built.report)


# --- machines that go wrong


@pytest.fixture(scope="module")
def session(built: Built) -> Session:
    """The open modules of the default cell, as its build left them."""
    folder = built.out / "modules" / built.set.id / ModuleType.OPEN
    modules = {name: (folder / f"{name}.ko").read_bytes() for name in LOADED}
    guest = loading.guest(
        built.plan, built.set, built.inputs, engine=built.engine, cache=built.cache, report=built.report
    )
    return loading.session({ModuleType.OPEN: modules}, guest, [], modversions=True)


def boot(built: Built, session: Session, folder: Path, patience: float = loading.PATIENCE) -> dict[str, Answer]:
    return loading.boot(Arch.AMD64, kernel_of(built).vmlinuz, session, folder, folder / "log", patience)


def test_a_module_that_never_comes_back_is_no_verdict(built: Built, session: Session, tmp_path: Path) -> None:
    """Patience is short: however long it were, this would not end."""
    files = {**session.files, f"open/{SPOILED}.ko": looping(session.files[f"open/{SPOILED}.ko"])}
    with pytest.raises(InfrastructureError, match="did not end in 25 s") as caught:
        boot(built, replace(session, files=files), tmp_path, patience=25)
    assert str(tmp_path / "log") in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]
    assert loading.read((tmp_path / "log").read_text(), session.steps)["load/open/nvidia"].errno == 0


def test_a_kernel_without_our_program_is_no_verdict(built: Built, session: Session, tmp_path: Path) -> None:
    files = {**session.files, "init": b"not a program"}
    with pytest.raises(InfrastructureError, match="its kernel did not start our program") as caught:
        boot(built, replace(session, files=files), tmp_path)
    assert caught.value.got
    assert "Kernel panic" in caught.value.got


def test_a_machine_too_small_for_what_it_is_given_is_no_verdict(built: Built, session: Session, tmp_path: Path) -> None:
    """The kernel unpacks as much as it has room for: a list of steps that was cut off would be a list all the same."""
    big = {f"big/{number}": bytes(64 << 20) for number in range(4)}
    loading.write_initrd(tmp_path / "initrd", replace(session, files={**session.files, **big}))
    small = Boot(kernel_of(built).vmlinuz, tmp_path / "initrd", memory=448)
    ended = machine.run(Arch.AMD64, small, tmp_path / "log", patience=loading.PATIENCE)
    assert loading.read(ended.console, session.steps) == {}


def test_without_the_modules_the_steps_say_which_file_is_not_there(
    built: Built, session: Session, tmp_path: Path
) -> None:
    files = {name: data for name, data in session.files.items() if name != "open/nvidia.ko"}
    answers = boot(built, replace(session, files=files), tmp_path)
    assert answers["load/open/nvidia"].error == "ENOENT"
    assert answers["load/open/nvidia-modeset"].error == "ENOENT"
    assert answers["unload/open/nvidia"].error == "ENOENT"
    assert list(answers) == [step.id for step in session.steps]
