"""probe-package: what is understood of a package, and everything that is not, said at once and with its status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builds import __main__ as cli
from builds.lab import package
from builds.lab.package import Form, Line
from builds.model import Arch

from .test_manifest import elf_library
from .test_runfile import COMPRESS, tar_of, write_package

V = "550.163.01"
PLAIN = Form()
LINES = (
    Line("LICENSE", 0o444, "DOCUMENTATION", "installer", "NVIDIA_GLX-1.0"),
    Line("supported-gpus/LICENSE", 0o444, "DOCUMENTATION", "installer", "NVIDIA_GLX-1.0/supported-gpus"),
    Line("supported-gpus/supported-gpus.json", 0o444, "DOCUMENTATION", "installer", "NVIDIA_GLX-1.0/supported-gpus"),
    Line("kernel/Makefile", 0o644, "KERNEL_MODULE_SRC", "resman", "INHERIT_PATH_DEPTH:1"),
    Line("nvidia-smi", 0o755, "UTILITY_BINARY", "nvml"),
    Line("nvidia-settings", 0o755, "UTILITY_BINARY", "xutils"),
    Line("nvidia-modprobe", 0o4755, "NVIDIA_MODPROBE", "installer", "/usr/bin/"),
    Line(f"libcuda.so.{V}", 0o755, "CUDA_LIB", "gpgpu", "NATIVE /"),
    Line("libcuda.so.1", 0, "CUDA_SYMLINK", "gpgpu", "NATIVE /", f"libcuda.so.{V}"),
    Line(f"libnvidia-ml.so.{V}", 0o755, "UTILITY_LIB", "nvml", "NATIVE"),
)


def made(
    folder: Path,
    *,
    more: tuple[Line, ...] = (),
    without: tuple[str, ...] = (),
    files: dict[str, bytes] | None = None,
    form: Form = PLAIN,
    version: str = V,
    arch: Arch = Arch.AMD64,
) -> Path:
    """A small package that has what a node cannot do without, and what is asked for besides."""
    tree = folder / "tree"
    content = {line.path: elf_library(None) if ".so" in line.path else b"content" for line in LINES if line.mode}
    for name, data in (
        content | {"libnvidia-ml.so.550.163.01": elf_library("libnvidia-ml.so.1")} | (files or {})
    ).items():
        if name not in without:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(data)
    target = folder / f"NVIDIA-Linux-{arch.machine}-{version}.run"
    package.write(tree, version, arch, (*LINES, *more), target, lambda _: None, form)
    return target


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the verb; its status, standard output and standard error."""
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main(["probe-package", *map(str, arguments)])
        said = capsys.readouterr()
        assert not list((tmp_path / "cache").glob("probe/*")), "what was unpacked is gone again"
        return status, said.out, said.err

    return run


@pytest.mark.parametrize("form", [Form(), Form("xz", old=True), Form("gzip"), Form("zstd", decompressor=True)])
def test_a_sound_package_is_understood(form: Form, probe: Any, tmp_path: Path) -> None:
    path = made(tmp_path, form=form)
    status, _, said = probe(path)
    assert status == 0
    assert "every field was understood" in said
    status, out, _ = probe(path, "--json", "--arch", "amd64")
    found = json.loads(out)
    assert status == 0
    assert found["payload"] == form.payload
    assert bool(found["header"]["decompressor"]) == form.decompressor
    assert (found["version"], found["arch"], found["problems"]) == (V, "amd64", [])
    assert found["checksums"] == {"CRC": "ok", "MD5": "ok"}
    assert found["module_types"] == ["proprietary"]
    assert found["types"]["UTILITY_BINARY"] == 2
    assert found["kernel_modules"][0] == "nvidia"
    # The last is a SONAME link, which no manifest need have.
    assert {one["dest"].rpartition("/")[2] for one in found["selected"]} >= {
        "nvidia-smi",
        "libcuda.so.1",
        "libnvidia-ml.so.1",
    }
    assert [one["path"] for one in found["dropped"] if one["reason"] == "a desktop's settings and menus"] == [
        "nvidia-settings"
    ]


def test_everything_that_is_not_understood_is_named_at_once(probe: Any, tmp_path: Path) -> None:
    path = made(
        tmp_path,
        more=(
            Line("a", 0o755, "WARP_LIB", "x", "NATIVE"),
            Line("b", 0o755, "WARP_LIB", "x"),
            Line("c", 0o755, "CUDA_LIB", "x", "/"),
            Line("libgone.so.1", 0o755, "CUDA_LIB", "x", "NATIVE /"),
            Line("libgl.so.1", 0o755, "OPENGL_LIB", "x", "NATIVE"),
        ),
        files={"kernel/stray.c": b"x"},
        without=("nvidia-modprobe",),
    )
    status, out, said = probe(path, "--json")
    assert status == 3
    assert "is not understood, in 5 points" in said
    assert "Traceback" not in said
    found = json.loads(out)
    assert found["problems"][0] == "unknown type WARP_LIB (line 10, 11)"
    assert found["problems"][1].startswith("line 12: c: a CUDA_LIB has a NATIVE or COMPAT32 here")
    assert found["missing"] == [
        "nvidia-modprobe: not in the package",
        "libgone.so.1: not in the package",
        "libgl.so.1: not in the package",
    ]
    assert found["unnamed"] == ["kernel/stray.c"]
    status, _, said = probe(path)
    assert status == 3
    assert "unknown type WARP_LIB (line 10, 11)" in said


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (Line("x/nvidia-smi", 0o755, "UTILITY_BINARY", "x"), "has two entries for usr/bin/nvidia-smi"),
        (Line("../nvidia-smi", 0o755, "UTILITY_BINARY", "x"), "leads out of its folder"),
        (Line("LICENSE", 0o755, "CUDA_LIB", "x", "NATIVE /"), None),
        (Line("kernel/Makefile.so", 0o755, "CUDA_LIB", "x", "NATIVE /"), "is not a library that can be read"),
    ],
)
def test_what_contradicts_itself_is_named(more: Line, problem: str | None, probe: Any, tmp_path: Path) -> None:
    files = {more.path: b"text"} if not more.path.startswith("..") else {}
    status, _, said = probe(made(tmp_path, more=(more,), files=files))
    assert status == (3 if problem else 0)
    assert (problem or "every field was understood") in said


def test_header_and_manifest_speak_of_one_version(probe: Any, tmp_path: Path) -> None:
    text = package.manifest("550.54.15", Arch.AMD64, LINES)
    path = write_package(tmp_path / "x.run", COMPRESS["xz"](tar_of({".manifest": text.encode()})), version=V)
    status, _, said = probe(path)
    assert status == 3
    assert f"the header says version {V}, the manifest 550.54.15" in said


def test_a_decompressor_ends_where_the_payload_starts(probe: Any, tmp_path: Path) -> None:
    text = package.manifest(V, Arch.AMD64, LINES)
    payload = COMPRESS["xz"](tar_of({".manifest": text.encode()}))
    path = write_package(tmp_path / "x.run", payload, version=V, decompressor=b"#!/bin/sh\n", sums=False)
    path.write_bytes(path.read_bytes().replace(b"size_decompress=1", b"size_decompress=7"))
    assert "7 lines of decompressor from line 16 on do not end at line 17" in probe(path)[2]


def test_a_package_without_checksums_of_its_own_is_read_and_said_to_be_one(probe: Any, tmp_path: Path) -> None:
    text = package.manifest(V, Arch.AMD64, LINES)
    files = {line.path: elf_library(None) if ".so" in line.path else b"x" for line in LINES if line.mode}
    payload = COMPRESS["gzip"](tar_of({".manifest": text.encode(), **files}))
    status, out, _ = probe(write_package(tmp_path / "x.run", payload, version=V, sums=False), "--json")
    assert json.loads(out)["checksums"] == {"CRC": "not given", "MD5": "not given"}
    assert status == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:-100], "is damaged, cut short or altered"),
        (lambda data: data + b"\n", "is damaged, cut short or altered"),
        (lambda _: b"", "an empty file"),
        (lambda _: b"<!DOCTYPE html><html>", "a web page"),
        (lambda data: data.replace(b"x86_64", b"sparc64"), "is of no architecture that is known here, got sparc64"),
    ],
)
def test_a_damaged_package_is_an_error_of_the_build(spoil: Any, said: str, probe: Any, tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    status, out, err = probe(path, "--json")
    assert (status, out) == (3, "")
    assert said in err


def test_another_architecture_than_the_one_asked_for_is_refused(probe: Any, tmp_path: Path) -> None:
    status, _, said = probe(made(tmp_path, arch=Arch.ARM64), "--arch", "amd64")
    assert status == 3
    assert "is not of architecture x86_64, got aarch64" in said


def test_a_version_is_looked_for_where_packages_come_from(probe: Any, tmp_path: Path) -> None:
    made(tmp_path, arch=Arch.ARM64)
    status, _, _ = probe(V, "--arch", "arm64", "--nvidia-base-url", tmp_path)
    assert status == 0
    status, _, said = probe(V, "--nvidia-base-url", tmp_path)
    assert status == 2
    assert f"NVIDIA-Linux-x86_64-{V}.run" in said


@pytest.mark.parametrize("package", ["nothing", "", "550", "/nowhere/550.163.01.run"])
def test_what_is_neither_file_nor_version_is_a_mistake_of_the_command_line(package: str, probe: Any) -> None:
    status, _, said = probe(package)
    assert status == 2
    assert "must be a file or a version" in said
