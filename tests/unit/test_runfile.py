"""Driver packages: sound ones of every format are read, damaged and foreign ones are refused with a reason."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from builds.errors import BuildError, InfrastructureError
from builds.model import Arch
from builds.runfile import RunHeader, check, package_name, payload_format, read_header, unpack

VERSION = "550.163.01"
FILES = {".manifest": b"a manifest\n", "kernel/Makefile": b"all:\n", "libcuda.so.550.163.01": bytes(range(256)) * 9}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstandard.ZstdCompressor(level=3).compress,
    "xz": lzma.compress,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "plain": bytes,
}


def tar_of(files: dict[str, bytes], prefix: str = "./", **special: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size, member.mode = len(content), 0o4755
            archive.addfile(member, io.BytesIO(content))
        if special:
            member = tarfile.TarInfo(special.pop("name"))
            for key, value in special.items():
                setattr(member, key, value)
            archive.addfile(member)
    return out.getvalue()


def write_package(
    path: Path,
    payload: bytes,
    *,
    version: str = VERSION,
    machine: str = "x86_64",
    system: str = "Linux",
    quote: str = '"',
    decompressor: bytes = b"",
    sums: bool = True,
) -> Path:
    """Put a package together as the vendor does; the checksums are the shell's, not the module's."""
    body = [f"label={quote}NVIDIA Accelerated Graphics Driver for Linux-{machine} {version}{quote}"]
    body += [f"version_string={version}", f"targetdir={quote}NVIDIA-Linux-{machine}-{version}{quote}"]
    body += [f"TARGET_OS={quote}{system}{quote}", f"TARGET_ARCH={quote}{machine}{quote}"]
    body += ["if test $# -gt 1; then", "    targetdir=$2; version_string=0", "fi"]
    if decompressor:
        first = 3 + len(body) + 2 + 2 + 1
        body += [f"skip_decompress={first}", f"size_decompress={decompressor.count(10)}"]
    # skip= itself and the exit are two more lines.
    skip = 3 + len(body) + 2 + decompressor.count(10) + 1
    body += [f"skip={skip}", "exit 0"]
    rest = ("\n".join(body) + "\n").encode() + decompressor + payload
    cksum = subprocess.run(["cksum"], input=rest, stdout=subprocess.PIPE, check=True).stdout.split()[0].decode()
    md5 = hashlib.md5(rest, usedforsecurity=False).hexdigest()
    lines = (f"CRCsum={cksum}", f"MD5={md5}") if sums else ("CRCsum=0000000000", f"MD5={'0' * 32}")
    path.write_bytes("\n".join(("#! /bin/sh", *lines, "")).encode() + rest)
    return path


def package(tmp_path: Path, **more: Any) -> Path:
    payload = more.pop("payload", None) or COMPRESS["zstd"](tar_of(FILES))
    return write_package(tmp_path / "driver.run", payload, **more)


def checked(path: Path, **more: Any) -> str:
    asked: dict[str, Any] = {"version": VERSION, "arch": Arch.AMD64, "sha256": None} | more
    return check(path, read_header(path), **asked)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_package_name() -> None:
    assert package_name(VERSION, Arch.AMD64) == "NVIDIA-Linux-x86_64-550.163.01.run"
    assert package_name(VERSION, Arch.ARM64) == "NVIDIA-Linux-aarch64-550.163.01.run"


@pytest.mark.parametrize("quote", ['"', "'", ""])
def test_header_is_read_as_first_assigned(tmp_path: Path, quote: str) -> None:
    header = read_header(package(tmp_path, quote=quote, version=VERSION))
    assert (header.version, header.target_os, header.machine) == (VERSION, "Linux", "x86_64")
    assert header.targetdir == f"NVIDIA-Linux-x86_64-{VERSION}"
    if quote:
        assert header.label.endswith(f"for Linux-x86_64 {VERSION}")


@pytest.mark.parametrize("prefix", ["./", "", f"NVIDIA-Linux-x86_64-{VERSION}/"])
@pytest.mark.parametrize("decompressor", [b"", b"\x7fELF\n\n\0MD5=ffff\nskip=7\n"])
@pytest.mark.parametrize("form", COMPRESS)
def test_sound_packages_pass_and_unpack(tmp_path: Path, form: str, decompressor: bytes, prefix: str) -> None:
    path = package(tmp_path, payload=COMPRESS[form](tar_of(FILES, prefix)), decompressor=decompressor)
    header = read_header(path)
    assert payload_format(path, header) == ("tar" if form == "plain" else form)
    lines = decompressor.count(b"\n")
    assert header.decompressor == ((header.skip - lines, lines) if decompressor else None)
    seen: list[int] = []
    digest = checked(path, progress=seen.append)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(seen) == path.stat().st_size
    assert checked(path, sha256=digest.upper()) == digest

    unpack(path, read_header(path), tmp_path / "tree")
    assert content_of(tmp_path / "tree") == FILES
    assert (tmp_path / "tree" / ".manifest").stat().st_mode & 0o7022 == 0


def test_nothing_of_a_package_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    program = f"#! /bin/sh\ntouch {marker}\n".encode()
    path = package(tmp_path, decompressor=program)
    path.chmod(0o755)
    assert checked(path)
    unpack(path, read_header(path), tmp_path / "tree")
    assert not marker.exists()
    subprocess.run(["sh"], input=program, check=True)
    assert marker.exists(), "it would have shown"


def test_several_frames_with_padding_are_one_payload(tmp_path: Path) -> None:
    tar = tar_of(FILES)
    half = len(tar) // 2
    for name in ("zstd", "xz", "gzip", "bzip2"):
        pack = COMPRESS[name]
        path = package(tmp_path, payload=pack(tar[:half]) + pack(tar[half:]) + bytes(512))
        unpack(path, read_header(path), tmp_path / name)
        assert content_of(tmp_path / name) == FILES


def test_progress_of_unpacking_is_the_payload(tmp_path: Path) -> None:
    payload = COMPRESS["gzip"](tar_of(FILES))
    seen: list[int] = []
    path = package(tmp_path, payload=payload)
    unpack(path, read_header(path), tmp_path / "tree", progress=seen.append)
    assert sum(seen) == len(payload)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html>\n<html><body>sign in</body></html>\n", "a web page"),
        (b"\n <HTML lang='en'>\n", "a web page"),
        (b"\x7fELF" + bytes(range(256)) * 4096, "a file that starts with"),
        (b"\n" * (1 << 20), "a file that starts with"),
    ],
)
def test_what_is_no_package_is_refused(tmp_path: Path, content: bytes, got: str) -> None:
    path = tmp_path / "driver.run"
    path.write_bytes(content)
    with pytest.raises(BuildError, match="is not a driver package") as caught:
        read_header(path)
    assert caught.value.got is not None
    assert caught.value.got.startswith(got)
    assert caught.value.hint


def test_absent_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read"):
        read_header(tmp_path / "driver.run")


def test_script_without_the_variables_names_all_that_lack(tmp_path: Path) -> None:
    path = tmp_path / "driver.run"
    path.write_bytes(b"#!/bin/sh\nskip=x\nTARGET_OS=Linux\nMD5=12\nexit 0\n")
    with pytest.raises(BuildError) as caught:
        read_header(path)
    assert caught.value.got == "skip=x, no version_string=, no TARGET_ARCH=, MD5=12"


@pytest.mark.parametrize("name", ["skip", "CRCsum", "skip_decompress", "size_decompress"])
@pytest.mark.parametrize("value", ["-1", "x", "9" * 5000])
def test_a_number_that_is_none_is_named(tmp_path: Path, name: str, value: str) -> None:
    path = package(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"#! /bin/sh\n", f"#! /bin/sh\n{name}={value}\n".encode()))
    with pytest.raises(BuildError, match="has a header that is not a driver package's") as caught:
        read_header(path)
    assert f"{name}={value}" in str(caught.value.got)


@pytest.mark.parametrize("more", [b"\n", b"\0", b"more", bytes(512)])
def test_something_behind_a_package_is_found(tmp_path: Path, more: bytes) -> None:
    path = package(tmp_path)
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(BuildError, match="is damaged, cut short or altered: the header's MD5"):
        checked(path)


@pytest.mark.parametrize("form", COMPRESS)
def test_something_behind_a_payload_is_found(tmp_path: Path, form: str) -> None:
    path = package(tmp_path, payload=COMPRESS[form](tar_of(FILES)) + b"more of it")
    with pytest.raises(BuildError, match="damaged payload"):
        unpack(path, read_header(path), tmp_path / "tree")


@pytest.mark.parametrize(
    ("made", "expected", "got"),
    [
        ({"machine": "aarch64"}, "architecture x86_64", "aarch64"),
        ({"version": "550.54.15"}, f"version {VERSION}", "550.54.15"),
        ({"system": "FreeBSD"}, "system Linux", "FreeBSD"),
    ],
)
def test_another_package_is_refused_by_name(tmp_path: Path, made: dict[str, str], expected: str, got: str) -> None:
    with pytest.raises(BuildError, match=f"is not of {expected}, got {got}"):
        checked(package(tmp_path, **made))


@pytest.mark.parametrize("step", range(12))
def test_any_changed_byte_is_found(tmp_path: Path, step: int) -> None:
    path = package(tmp_path)
    whole = bytearray(path.read_bytes())
    # From line 4 on; the variables' own lines are checked by value.
    start = whole.index(b"exit 0")
    at = start + (len(whole) - 1 - start) * step // 11
    whole[at] ^= 0x20
    path.write_bytes(whole)
    with pytest.raises(BuildError, match="is damaged, cut short or altered: the header's MD5"):
        checked(path)


def test_truncated_package_is_found_by_each_checksum(tmp_path: Path) -> None:
    path = package(tmp_path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    for crc, md5, named in ((header.crc, None, "CRC"), (None, header.md5, "MD5")):
        one = RunHeader(crc, md5, header.skip, VERSION, "Linux", "x86_64", "", "")
        with pytest.raises(BuildError, match=f"the header's {named} is"):
            check(path, one, version=VERSION, arch=Arch.AMD64, sha256=None)


def test_crc_of_an_even_length_is_the_shells(tmp_path: Path) -> None:
    # cksum goes on over the length: lengths around a byte's limit are where an implementation slips.
    for size in (0, 1, 255, 256, 257, 65535, 65536):
        path = tmp_path / "driver.run"
        rest = b"x" * size
        path.write_bytes(b"#!/bin/sh\n\n\n" + rest)
        crc = int(subprocess.run(["cksum"], input=rest, stdout=subprocess.PIPE, check=True).stdout.split()[0])
        header = RunHeader(crc, None, 5, VERSION, "Linux", "x86_64", "", "")
        assert check(path, header, version=VERSION, arch=Arch.AMD64, sha256=None)


def test_pin_is_compared_first_and_shown(tmp_path: Path) -> None:
    path = package(tmp_path)
    with pytest.raises(BuildError, match="the expected sha256 is 0000") as caught:
        checked(path, sha256="0" * 64)
    assert caught.value.got == hashlib.sha256(path.read_bytes()).hexdigest()


def test_package_without_checksums_needs_a_pin(tmp_path: Path) -> None:
    path = package(tmp_path, sums=False)
    assert (read_header(path).crc, read_header(path).md5) == (None, None)
    with pytest.raises(BuildError, match="no checksum of its own"):
        checked(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert checked(path, sha256=digest) == digest


@pytest.mark.parametrize("form", COMPRESS)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.95])
def test_cut_payload_is_an_error_of_ours(tmp_path: Path, form: str, keep: float) -> None:
    payload = COMPRESS[form](tar_of(FILES))
    if form == "plain":
        payload = payload[: -(len(payload) % 10240 or 10240) + 1024]  # without the padding behind the end
    path = package(tmp_path, payload=payload[: int(len(payload) * keep)] or b"\0")
    with pytest.raises(BuildError):
        unpack(path, read_header(path), tmp_path / "tree")


@pytest.mark.parametrize("form", ["zstd", "xz", "gzip", "bzip2"])
def test_damaged_payload_is_an_error_of_ours(tmp_path: Path, form: str) -> None:
    payload = bytearray(COMPRESS[form](tar_of(FILES)))
    for at in range(12, len(payload), max(1, len(payload) // 40)):
        damaged = bytearray(payload)
        damaged[at] ^= 0xFF
        path = package(tmp_path, payload=bytes(damaged))
        dest = tmp_path / f"tree{at}"
        try:
            unpack(path, read_header(path), dest)
        except BuildError:
            continue
        # zstd frames of this writer carry no checksum: a changed literal is for check() to find.
        assert form == "zstd" or content_of(dest) == FILES


def test_damaged_member_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    tar = bytearray(tar_of(FILES))
    tar[tar.index(b"./kernel/Makefile")] ^= 0x01
    path = package(tmp_path, payload=COMPRESS["zstd"](bytes(tar)))
    with pytest.raises(BuildError, match="damaged payload"):
        unpack(path, read_header(path), tmp_path / "tree")


@pytest.mark.parametrize(
    "special",
    [
        {"name": "../evil"},
        {"name": "/evil"},
        {"name": "kernel/../../evil"},
        {"name": "link", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"name": "link", "type": tarfile.SYMTYPE, "linkname": "../outside"},
        {"name": "link", "type": tarfile.LNKTYPE, "linkname": "../outside"},
        {"name": "link", "type": tarfile.LNKTYPE, "linkname": "nothing"},
        {"name": "device", "type": tarfile.CHRTYPE},
    ],
)
def test_payload_cannot_reach_out(tmp_path: Path, special: dict[str, Any]) -> None:
    path = package(tmp_path, payload=COMPRESS["gzip"](tar_of(FILES, **special)))
    with pytest.raises(BuildError):
        unpack(path, read_header(path), tmp_path / "deep" / "tree")
    assert not list(tmp_path.rglob("evil"))


def test_payload_must_start_within_the_file(tmp_path: Path) -> None:
    path = package(tmp_path)
    header = RunHeader(None, None, 10**6, VERSION, "Linux", "x86_64", "", "")
    with pytest.raises(BuildError, match="has no line 1000000"):
        unpack(path, header, tmp_path / "tree")


def test_unknown_format_and_missing_manifest_are_named(tmp_path: Path) -> None:
    path = package(tmp_path, payload=b"PK\3\4" + bytes(600))
    with pytest.raises(BuildError, match="no known format"):
        unpack(path, read_header(path), tmp_path / "zip")
    path = package(tmp_path, payload=tar_of({"README": b"x", "kernel/a": b"y"}))
    with pytest.raises(BuildError, match=r"holds no \.manifest, got README, kernel"):
        unpack(path, read_header(path), tmp_path / "tree")


def test_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "mine").write_text("mine")
    path = package(tmp_path)
    with pytest.raises(BuildError, match="not empty"):
        unpack(path, read_header(path), tmp_path / "tree")
    assert content_of(tmp_path / "tree") == {"mine": b"mine"}


def test_full_disk_is_nobodys_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    path = package(tmp_path)
    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(InfrastructureError, match="disk is full"):
        unpack(path, read_header(path), tmp_path / "tree")
