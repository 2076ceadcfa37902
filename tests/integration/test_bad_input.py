"""What users get wrong, and what machines do to them: it is said, has its exit status, and leaves nothing half-done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builds import layers, oci, recipes, runfile
from builds.cache import file_sha256, key_of
from builds.lab import package
from builds.lab.package import Line
from builds.layers import Entry
from builds.model import Arch
from builds.record import Record

from .conftest import ROOT, Built, Cli, environment

Spoil = Callable[[Path, Path], None]


def _places(good: Path) -> dict[str, int]:
    """Offsets of a byte in each part of a package that has a decompressor."""
    header, data = runfile.read_header(good), good.read_bytes()
    assert header.decompressor, "the lab's 550 package has one"
    lines = [0]
    while len(lines) < header.skip:
        lines.append(data.index(b"\n", lines[-1]) + 1)
    decompressor, payload = lines[header.decompressor[0] - 1], lines[header.skip - 1]
    return {
        "in its checksum": lines[1] + len(b"CRCsum=1"),
        "in its header": lines[4] + len('label="NV'),
        "in its decompressor": (decompressor + payload) // 2,
        "in its payload": (payload + len(data)) // 2,
        "at its end": len(data) - 1000,
    }


def _truncated(place: str) -> Spoil:
    def spoil(good: Path, bad: Path) -> None:
        shutil.copyfile(good, bad)
        os.truncate(bad, _places(good)[place])

    return spoil


def _changed(place: str) -> Spoil:
    def spoil(good: Path, bad: Path) -> None:
        data = bytearray(good.read_bytes())
        data[_places(good)[place]] ^= 1
        bad.write_bytes(data)

    return spoil


def _appended(good: Path, bad: Path) -> None:
    shutil.copyfile(good, bad)
    with bad.open("ab") as file:
        file.write(b"\0")


def _html(_good: Path, bad: Path) -> None:
    bad.write_text("<!DOCTYPE html><html><body>Access denied</body></html>")


def _empty(_good: Path, bad: Path) -> None:
    bad.touch()


def _package(version: str, arch: Arch, *lines: Line) -> Spoil:
    """A package that is whole, of another version or architecture, or with a manifest of its own."""

    def write(_good: Path, bad: Path) -> None:
        tree = bad.parent / "tree"
        (tree / "kernel").mkdir(parents=True)
        (tree / "kernel/Makefile").write_text("all:\n")
        package.write(tree, version, arch, lines, bad, lambda _: None)

    return write


_DAMAGED = "is damaged, cut short or altered"

BAD_PACKAGES: dict[str, tuple[Spoil, str]] = {
    "truncated at its end": (_truncated("at its end"), _DAMAGED),
    "truncated in its payload": (_truncated("in its payload"), _DAMAGED),
    "truncated in its decompressor": (_truncated("in its decompressor"), _DAMAGED),
    "truncated in its header": (_truncated("in its header"), "has a header that is not a driver package's"),
    "a byte changed in its checksum": (_changed("in its checksum"), _DAMAGED),
    "a byte changed in its header": (_changed("in its header"), _DAMAGED),
    "a byte changed in its decompressor": (_changed("in its decompressor"), _DAMAGED),
    "a byte changed in its payload": (_changed("in its payload"), _DAMAGED),
    "a byte appended": (_appended, _DAMAGED),
    "html": (_html, "a web page"),
    "empty": (_empty, "an empty file"),
    "other architecture": (_package("550.163.01", Arch.ARM64), "aarch64"),
    "other version": (_package("550.163.02", Arch.AMD64), "550.163.02"),
}


def _is_refused(bad: Path, said: str, built: Built, builds: Cli, out: Path) -> None:
    """A build from a bad package ends with the reason, and leaves no image in ``out``."""
    done = builds("build", str(built.cell), env={"NVIDIA_BASE_URL": str(bad), "OUT_DIR": str(out)})
    assert done.returncode == 3, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / str(built.cell) / "image").exists()


@pytest.mark.parametrize("case", BAD_PACKAGES)
def test_a_bad_driver_package_is_refused(case: str, built: Built, builds: Cli, tmp_path: Path) -> None:
    spoil, said = BAD_PACKAGES[case]
    bad = tmp_path / built.plan.package.name
    spoil(built.inputs.package, bad)
    out = tmp_path / "out"
    _is_refused(bad, said, built, builds, out)
    assert not (out / str(built.cell) / "plan.json").exists()
    done = builds("plan", str(built.cell))
    assert done.returncode == 0, "the good one is still there"


BAD_MANIFESTS = {
    "a missing file": (Line("nvidia-smi", 0o755, "UTILITY_BINARY", "nvml"), "nvidia-smi: not in the package"),
    "an unknown type": (Line("nvidia-smi", 0o755, "WARP_BINARY", "nvml"), "unknown type WARP_BINARY (line 9)"),
    "a way out": (Line("../nvidia-smi", 0o755, "UTILITY_BINARY", "nvml"), "leads out of its folder"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_bad_manifest_is_refused_before_anything_is_compiled(
    case: str, built: Built, builds: Cli, tmp_path: Path
) -> None:
    """The package itself is whole, so only what it says can tell."""
    line, said = BAD_MANIFESTS[case]
    bad = tmp_path / built.plan.package.name
    _package(built.cell.driver, built.cell.arch, line)(built.inputs.package, bad)
    out = tmp_path / "out"
    _is_refused(bad, said, built, builds, out)
    assert not list(out.rglob("*.ko"))
    assert not built.cache.find("driver", key_of(package=file_sha256(bad), recipe=recipes.DRIVER_TREE))


HEADERS = {
    "include/generated/utsrelease.h": '#define UTS_RELEASE "6.1.0-99-cloud-amd64"\n',
    "include/generated/uapi/linux/version.h": "#define LINUX_VERSION_CODE 393394\n",
    ".config": "CONFIG_X86_64=y\n",
    "Module.symvers": "0x00000000\tvfree\tvmlinux\tEXPORT_SYMBOL\t\n",
}
SECOND = [
    Entry(f"usr/src/linux-headers-6.1.0-99-cloud-amd64/{name}", "file", 0o644, text.encode())
    for name, text in HEADERS.items()
]


@pytest.mark.parametrize(
    ("case", "said"),
    [("without headers", "no headers at all"), ("two of a flavour", "6.1.0-99-cloud-amd64")],
)
def test_a_kmodbuild_image_must_have_one_kernel_of_the_flavour(
    case: str, said: str, built: Built, builds: Cli, tmp_path: Path
) -> None:
    """The base image has no headers; a layer on top of the sound kmodbuild image brings a second candidate."""
    source = built.inputs.base if case == "without headers" else built.kmodbuild
    layout = tmp_path / "images" / "kmodbuild"
    oci.create(layout)
    stack = list(source.layers)
    for digest in [layer.descriptor.digest for layer in stack]:
        os.link(oci.blob_path(source.layout, digest), oci.blob_path(layout, digest))
    if case != "without headers":
        more = layers.write_layer(SECOND, tmp_path / "layer")
        (tmp_path / "layer").rename(oci.blob_path(layout, more.descriptor.digest))
        stack.append(more)
    oci.add_image(layout, stack, arch=Arch.AMD64, names=[f"amd64-{built.cell.gl}"])
    base = tmp_path / "images"
    oci.create(base)
    for blob in (built.inputs.base.descriptor, built.inputs.base.config_descriptor):
        shutil.copyfile(oci.blob_path(built.inputs.base.layout, blob.digest), oci.blob_path(base, blob.digest))
    oci.name_image(base, built.inputs.base.descriptor, ["debian13"])
    env = {"GL_REGISTRY": f"oci:{base}", "NVIDIA_BASE_URL": str(built.inputs.package), "OUT_DIR": str(tmp_path / "out")}
    done = builds("build", str(built.cell), env=env)
    assert done.returncode == 3, done.stderr
    assert "must have the headers of exactly one cloud kernel for amd64" in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def _disk(place: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """A small disk at a place; gives a function that makes it larger."""
    place.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tests", str(place)], check=True)

    mount(f"size={megabytes}m")
    try:
        yield lambda more: mount("remount", f"size={more}m")
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("megabytes", [1, 60, 200])
def test_a_full_output_folder_is_said_and_the_next_run_ends_well(
    megabytes: int, built: Built, builds: Cli, tmp_path: Path
) -> None:
    """Full while the modules are copied, while the image is written, and at the very start."""
    with _disk(tmp_path / "out", megabytes) as enlarge:
        out = tmp_path / "out"
        done = builds("verify", str(built.cell), env={"OUT_DIR": str(out)})
        assert done.returncode == 5, done.stderr
        assert "the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(out.glob("*/record.json"))
        assert not list(out.glob("*/*.part"))
        enlarge(1000)
        done = builds("verify", str(built.cell), env={"OUT_DIR": str(out)})
        assert done.returncode == 0, done.stderr
        assert Record.read(out / str(built.cell) / "record.json").digest == built.image.digest


def _apart(built: Built, cache: Path) -> dict[str, str]:
    """An empty cache, with the lab's inputs where a user's mirror would be."""
    images = f"oci:{built.cache.root}/lab/images"
    return {"GL_REGISTRY": images, "NVIDIA_BASE_URL": str(built.inputs.package), "CACHE_DIR": str(cache)}


@pytest.mark.parametrize("megabytes", [1, 100, 900])
def test_a_full_cache_is_said_and_the_next_run_ends_well(
    megabytes: int, built: Built, builds: Cli, tmp_path: Path
) -> None:
    """Full while the kernel is read, while the package is unpacked, while layers are written. Nothing is compiled."""
    with _disk(tmp_path / "cache", megabytes) as enlarge:
        cache, out = tmp_path / "cache", tmp_path / "out"
        shutil.copytree(built.out / "modules", out / str(built.cell) / "modules")
        env = {**_apart(built, cache), "OUT_DIR": str(out)}
        done = builds("build-image", str(built.cell), env=env)
        assert done.returncode == 5, done.stderr
        assert "the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(cache.rglob("*.part"))
        assert not (out / str(built.cell) / "image").exists()
        enlarge(4000)
        done = builds("build-image", str(built.cell), env=env)
        assert done.returncode == 0, done.stderr
        assert oci.find_image(out / str(built.cell) / "image").digest == built.image.digest


def test_a_disk_that_fills_up_costs_no_record(built: Built, builds: Cli, tmp_path: Path) -> None:
    """What was verified stays verified: the record of the same bytes is replaced, never lost."""
    with _disk(tmp_path / "out", 800) as enlarge:
        out = tmp_path / "out"
        shutil.copytree(built.out, out / str(built.cell))
        done = builds("verify", str(built.cell), env={"OUT_DIR": str(out)})
        assert done.returncode == 0, done.stderr
        before = Record.read(out / str(built.cell) / "record.json")
        free = os.statvfs(out)
        with (out / "filler").open("wb") as filler:
            for _ in range(free.f_bavail * free.f_frsize // 4096):
                filler.write(b"\0" * 4096)
        done = builds("verify", str(built.cell), env={"OUT_DIR": str(out)})
        assert done.returncode == 5, done.stderr
        assert "the disk is full" in done.stderr
        assert Record.read(out / str(built.cell) / "record.json") == before
        enlarge(900)


def _at_once(*runs: tuple[list[str], dict[str, str]]) -> list[tuple[int, str]]:
    """Exit status and what was said of runs that go on at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "builds", *arguments],
            cwd=ROOT,
            env=environment(**env),
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments, env in runs
    ]
    said = [process.communicate()[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_two_builds_of_one_cell_at_once_end_well(built: Built, tmp_path: Path) -> None:
    """In one output folder one waits for the other."""
    command = ["build", str(built.cell)]
    done = _at_once(*[(command, {"OUT_DIR": str(tmp_path)})] * 2)
    assert [status for status, _ in done] == [0, 0], done
    assert any("waiting for another run" in said for _, said in done)
    assert oci.find_image(tmp_path / str(built.cell) / "image").digest == built.image.digest


def test_two_runs_that_share_an_empty_cache_end_well(built: Built, tmp_path: Path) -> None:
    """In folders of their own they meet at every part of the cache."""
    runs = []
    for name in ("one", "two"):
        shutil.copytree(built.out / "modules", tmp_path / name / str(built.cell) / "modules")
        env = {**_apart(built, tmp_path / "cache"), "OUT_DIR": str(tmp_path / name)}
        runs.append((["build-image", str(built.cell)], env))
    done = _at_once(*runs)
    assert [status for status, _ in done] == [0, 0], done
    digests = {oci.find_image(tmp_path / name / str(built.cell) / "image").digest for name in ("one", "two")}
    assert digests == {built.image.digest}


def test_credentials_in_an_address_show_nowhere(built: Built, builds: Cli, tmp_path: Path) -> None:
    env = {"NVIDIA_BASE_URL": "http://robot:hunter2@127.0.0.1:9/tesla", "OUT_DIR": str(tmp_path)}
    done = builds("build", str(built.cell), env=env)
    assert done.returncode == 5, done.stderr
    assert "http://127.0.0.1:9/tesla" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if b"hunter2" in path.read_bytes()]


def test_a_damaged_layout_is_made_again(built: Built, builds: Cli, tmp_path: Path) -> None:
    """A disk has changed a bit of the image in the output folder: what the plan lacks is built."""
    shutil.copytree(built.out, tmp_path / str(built.cell))
    layer = built.image.layers[-1].descriptor.digest
    blob = oci.blob_path(tmp_path / str(built.cell) / "image", layer)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    done = builds("build", str(built.cell), env={"OUT_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    oci.check_blobs(oci.find_image(tmp_path / str(built.cell) / "image"))
    assert json.loads((tmp_path / str(built.cell) / "plan.json").read_text())["image"] == built.plan.image
