"""Where a kernel comes from, and what is refused; packages and modules are of the tests' own making."""

from __future__ import annotations

import gzip
import io
import lzma
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from builds import kernel_image, oci
from builds.cache import Cache
from builds.console import Reporter
from builds.errors import BuildError, ConfigurationError, InfrastructureError
from builds.kernel import Kernel
from builds.kernel_image import KernelImage
from builds.model import Arch, KernelBuild
from builds.oci import Image
from builds.plan import InputImage, Inputs, ModuleSet, SetInputs

from . import test_kmod

RELEASE, VERSION = "6.1.0-50-cloud-amd64", "6.1.176-1"
BUILD = KernelBuild(RELEASE, "6.1.176", VERSION, "d" * 64, modversions=True)
SET = ModuleSet(("debian12",), Kernel(BUILD, "/src", "/out", {}, drm=False), InputImage("x", "sha256:0"), {}, {})
TREE = {
    f"./boot/vmlinuz-{RELEASE}": b"kernel",
    f"./boot/System.map-{RELEASE}": b"symbols",
    f"./lib/modules/{RELEASE}/kernel/drivers/gpu/drm.ko": b"drm",
    f"./lib/modules/{RELEASE}/modules.builtin": b"",
    "./usr/share/doc/x/copyright": b"GPL",
}

Pack = Callable[[bytes], bytes]
PACKED: dict[str, tuple[str, Pack]] = {
    "plain": ("", lambda data: data),
    "gz": (".gz", gzip.compress),
    "xz": (".xz", lzma.compress),
    "zst": (".zst", zstandard.ZstdCompressor().compress),
}


def tar(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def ar(members: Mapping[str, bytes]) -> bytes:
    """As deb(5) describes it."""
    data = b"!<arch>\n"
    for name, content in members.items():
        data += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"100644", len(content))
        data += content + b"\n" * (len(content) % 2)
    return data


def deb(
    path: Path,
    files: Mapping[str, bytes] = TREE,
    *,
    package: str = f"linux-image-{RELEASE}",
    version: str = VERSION,
    arch: str = "amd64",
    pack: str = "xz",
) -> Path:
    """A Debian package; the name of its file is whatever it is."""
    suffix, squeeze = PACKED[pack]
    control = f"Package: {package}\nVersion: {version}\nArchitecture: {arch}\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        ar(
            {
                "debian-binary": b"2.0\n",
                f"control.tar{suffix}": squeeze(tar({"./control": control})),
                f"data.tar{suffix}": squeeze(tar(files)),
            }
        )
    )
    return path


def image(tmp_path: Path, files: Mapping[str, bytes]) -> Image:
    """An image of one layer, in a layout."""
    layout = tmp_path / "kmodbuild"
    oci.create(layout)
    layer = oci.add_bytes(layout, tar({name.removeprefix("./"): data for name, data in files.items()}), oci.LAYER_TAR)
    config: dict[str, Any] = {"architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [layer.digest]}}
    manifest = {"layers": [layer.to_json()]}
    return Image(layout, oci.add_bytes(layout, repr(files).encode(), oci.MANIFEST), manifest, config)


class Place:
    """A cache, and a kmodbuild image with or without a kernel."""

    def __init__(self, tmp_path: Path, files: Mapping[str, bytes]) -> None:
        self.cache = Cache(tmp_path / "cache")
        of = SetInputs(kmodbuild=image(tmp_path, files), symvers=tmp_path)
        self.inputs = Inputs({SET.id: of}, of.kmodbuild, tmp_path, {})

    def find(self, place: Path | None, arch: Arch = Arch.AMD64) -> KernelImage:
        means: dict[str, Any] = {"engine": None, "cache": self.cache, "report": Reporter()}
        return kernel_image.find(SET, arch, self.inputs, place, **means)


@pytest.fixture
def bare(tmp_path: Path) -> Place:
    """A kmodbuild image without a kernel, and no engine to ask its package source."""
    return Place(tmp_path, {"etc/os-release": b""})


# --- what is taken


@pytest.mark.parametrize(
    ("path", "inner"),
    [
        (f"boot/vmlinuz-{RELEASE}", "vmlinuz"),
        (f"lib/modules/{RELEASE}/kernel/a/b.ko", "modules/kernel/a/b.ko"),
        (f"usr/lib/modules/{RELEASE}/kernel/a/b.ko.xz", "modules/kernel/a/b.ko.xz"),
        (f"lib/modules/{RELEASE}/modules.dep", "modules/modules.dep"),
        (f"lib/modules/{RELEASE}/modules.builtin.modinfo", "modules/modules.builtin.modinfo"),
        ("boot/vmlinuz-6.1.0-49-cloud-amd64", None),
        (f"boot/vmlinuz-{RELEASE}-dbg", None),
        (f"usr/lib/debug/boot/vmlinuz-{RELEASE}", None),
        (f"boot/config-{RELEASE}", None),
        ("lib/modules/6.1.0-49-cloud-amd64/kernel/a.ko", None),
        (f"lib/modules/{RELEASE.replace('.', 'x')}/kernel/a.ko", None),
        (f"lib/modules/{RELEASE}/build/scripts/x.ko", None),
        (f"lib/modules/{RELEASE}/kernel/../../../../etc/x.ko", None),
        (f"lib/modules/{RELEASE}/kernel/a.txt", None),
    ],
)
def test_what_is_taken_of_a_package(path: str, inner: str | None, tmp_path: Path) -> None:
    assert kernel_image._target(path, RELEASE, tmp_path) == (inner and tmp_path / inner)


# --- KERNEL_IMAGE


@pytest.mark.parametrize("pack", PACKED)
def test_a_package_is_found_by_what_it_says_and_not_by_its_name(
    pack: str, bare: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    deb(folder / "linux-image-1.deb", version="6.1.170-1")
    deb(folder / "linux-image-2.deb", arch="arm64")
    deb(folder / "linux-image-3.deb", package="linux-image-6.1.0-50-amd64")
    (folder / f"linux-image-{RELEASE}_{VERSION}_amd64.deb").write_bytes(b"no package")
    deb(folder / "linux-image-zz.deb", pack=pack)
    monkeypatch.setenv("PATH", "")  # no command is needed to read any of them
    found = bare.find(folder)
    assert found.source == "package linux-image-zz.deb"
    assert found.vmlinuz.read_bytes() == b"kernel"
    kept = {str(path.relative_to(found.modules)) for path in found.modules.rglob("*") if path.is_file()}
    assert kept == {"kernel/drivers/gpu/drm.ko", "modules.builtin"}


def test_an_unsigned_kernel_is_the_kernel_as_well(bare: Place, tmp_path: Path) -> None:
    package = deb(tmp_path / "any.deb", package=f"linux-image-unsigned-{RELEASE}")
    assert bare.find(package).vmlinuz.read_bytes() == b"kernel"


@pytest.mark.parametrize(
    ("of", "got"),
    [
        ({"version": "6.1.170-1"}, f"linux-image-{RELEASE} 6.1.170-1 amd64"),
        ({"arch": "arm64"}, f"linux-image-{RELEASE} {VERSION} arm64"),
        ({"package": "linux-image-6.1.0-50-amd64"}, f"linux-image-6.1.0-50-amd64 {VERSION} amd64"),
        ({"package": f"linux-headers-{RELEASE}"}, f"linux-headers-{RELEASE} {VERSION} amd64"),
    ],
)
def test_a_package_of_another_kernel_is_refused_with_what_it_is(
    of: dict[str, Any], got: str, bare: Place, tmp_path: Path
) -> None:
    package = deb(tmp_path / "mine.deb", **of)
    with pytest.raises(ConfigurationError, match=r"KERNEL_IMAGE .*mine\.deb") as caught:
        bare.find(package)
    assert caught.value.got == got
    assert f"{RELEASE} ({VERSION})" in caught.value.fact


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "a page of HTML": lambda _: b"<html>404</html>",
    "cut in its first header": lambda data: data[:20],
    "cut in its control": lambda data: data[:150],
    "a size that is no number": lambda data: data.replace(b"100644  4 ", b"100644  x "),
    "no control": lambda data: data.replace(b"control.tar", b"another.tar"),
    "no data": lambda data: data.replace(b"data.tar", b"else.tar"),
    "unknown compression": lambda data: data.replace(b"control.tar.xz", b"control.tar.qq"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_package_is_refused_in_words(damage: str, bare: Place, tmp_path: Path) -> None:
    package = deb(tmp_path / "linux-image-x.deb")
    sound = package.read_bytes()
    package.write_bytes(DAMAGE[damage](sound))
    assert package.read_bytes() != sound
    with pytest.raises(ConfigurationError, match="is not the package"):
        bare.find(package)
    with pytest.raises(InfrastructureError, match="has no package of it"):
        bare.find(tmp_path)


@pytest.mark.parametrize("pack", PACKED)
@pytest.mark.parametrize("left", [0.2, 0.5, 0.9, 0.99, 0.999])
def test_a_package_cut_short_gives_no_kernel_with_fewer_modules(
    pack: str, left: float, bare: Place, tmp_path: Path
) -> None:
    """What a kernel lacks would be held against the driver. Where nothing but padding was cut off, it is whole."""
    noise = b"".join(bytes([a ^ b, a * b & 255]) for a in range(256) for b in range(64))
    modules = {f"./lib/modules/{RELEASE}/kernel/{number}.ko": noise for number in range(3)}
    package = deb(tmp_path / "x.deb", {**TREE, **modules}, pack=pack)
    data = package.read_bytes()
    begin = data.index(b"data.tar") + 60
    package.write_bytes(data[: begin + int((len(data) - begin) * left)])
    try:
        found = bare.find(package)
    except (InfrastructureError, ConfigurationError):
        return
    assert left > 0.9
    assert [(found.modules / "kernel" / f"{number}.ko").read_bytes() for number in range(3)] == [noise] * 3


def test_a_folder_where_a_file_should_be_in_the_package_is_no_kernel(bare: Place, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=f"no boot/vmlinuz-{RELEASE}"):
        bare.find(deb(tmp_path / "x.deb", {"./usr/share/doc/x": b""}))


def test_a_full_disk_is_not_the_packages_fault(bare: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_target: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_image, "_write", full)
    with pytest.raises(InfrastructureError, match="the disk is full"):
        bare.find(deb(tmp_path / "x.deb"))


def test_a_kernel_alone_has_no_modules(bare: Place, tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(b"any kernel")
    found = bare.find(tmp_path / "bzImage")
    assert found.vmlinuz.read_bytes() == b"any kernel"
    assert found.source == "file bzImage"
    assert found.closure(["drm"]) == []
    (tmp_path / "bzImage").write_bytes(b"another")
    assert bare.find(tmp_path / "bzImage").vmlinuz.read_bytes() == b"another"


# --- elsewhere


def test_the_kmodbuild_image_may_have_it(tmp_path: Path) -> None:
    place = Place(tmp_path, TREE)
    for named in (None, tmp_path / "empty", tmp_path):
        found = place.find(named)
        assert found.source == "kmodbuild image"
        assert found.vmlinuz.read_bytes() == b"kernel"
        assert (found.modules / "kernel/drivers/gpu/drm.ko").read_bytes() == b"drm"


def test_where_nothing_has_it_every_reason_is_said(bare: Place, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="is not to be had") as caught:
        bare.find(tmp_path / "nowhere")
    assert f"{RELEASE} ({VERSION})" in caught.value.subject
    for reason in (
        f"KERNEL_IMAGE has no package of it ({tmp_path / 'nowhere'})",
        f"kmodbuild image has none (no boot/vmlinuz-{RELEASE})",
        "needs a container engine",
    ):
        assert reason in str(caught.value)
    assert "KERNEL_IMAGE=" in str(caught.value)
    with pytest.raises(InfrastructureError, match="KERNEL_IMAGE is not set"):
        bare.find(None)


def test_what_fetches_a_package_tells_no_apt_from_a_failing_one(tmp_path: Path) -> None:
    """apt-get itself ends with 100. The commands are stand-ins, the shell is real."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = kernel_image._FETCH.replace(kernel_image._FOUND, str(tmp_path / "out"))

    def status() -> int:
        if (tmp_path / "out").exists():
            (tmp_path / "out").rmdir()
        env = {"PATH": str(folder), "ARCH": "amd64", "NAMES": "a b", "VERSION": "1"}
        return subprocess.run(["/bin/sh", "-c", script], env=env, capture_output=True, check=False).returncode

    def put(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    assert status() == kernel_image._NONE
    put("mkdir", 'exec /bin/mkdir "$@"')
    put("dpkg", "echo amd64")
    put("apt-get", "exit 100")
    assert status() == 1
    put("apt-get", 'case "$*" in *update) exit 0;; esac; exit 100')
    assert status() == 1
    put("apt-get", 'case "$*" in *update|*"download b:amd64=1") exit 0;; esac; exit 100')
    assert status() == 0


# --- the kernel's own modules


def module(*needs: str) -> bytes:
    return test_kmod.module(info=["license=GPL", f"depends={','.join(needs)}"])


def kernel(folder: Path, files: Mapping[str, bytes]) -> KernelImage:
    for name, data in files.items():
        path = folder / "modules" / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return KernelImage(folder)


def test_what_a_module_needs_comes_before_it_uncompressed_and_once(tmp_path: Path) -> None:
    made = kernel(
        tmp_path,
        {
            "gpu/drm-helper.ko.xz": lzma.compress(module("drm", "i2c-core")),
            "gpu/drm.ko.gz": gzip.compress(module()),
            "acpi/video.ko.zst": zstandard.ZstdCompressor().compress(module("backlight")),
            "video/backlight.ko": module(),
            "net/other.ko": b"not looked at",
        },
    )
    found = made.closure(["nvidia", "drm-helper", "video", "drm"])
    assert [name for name, _ in found] == ["drm", "drm_helper", "backlight", "video"]
    assert dict(found)["drm_helper"] == module("drm", "i2c-core")


@pytest.mark.parametrize("needs", [("a",), ("b",), ("b", "a")])
def test_modules_that_need_each_other_are_no_endless_loop(needs: tuple[str, ...], tmp_path: Path) -> None:
    made = kernel(tmp_path, {"a.ko": module(*needs), "b.ko": module("a")})
    assert [name for name, _ in made.closure(["a"])] == (["a"] if needs == ("a",) else ["b", "a"])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ko", b"no module"),
        ("a.ko.xz", lzma.compress(module())[:-8]),
        ("a.ko.xz", b"junk"),
        ("a.ko.gz", gzip.compress(module())[:-12]),
        ("a.ko.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9),
        ("a.ko.zst", zstandard.ZstdCompressor().compress(module())[:-4]),
        ("a.ko.zst", b"junk"),
    ],
)
def test_a_module_that_cannot_be_read_is_said(name: str, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"a\.ko"):
        kernel(tmp_path, {name: data}).closure(["a"])


def test_two_builds_of_one_name_are_two_kernels(bare: Place, tmp_path: Path) -> None:
    """The package of the other build is not this one's, though release and architecture are the same."""
    package = deb(tmp_path / "kernels" / "linux-image-x.deb")
    wanted = kernel_image._Wanted(BUILD, Arch.AMD64, bare.cache)
    assert kernel_image._fits(package, wanted)
    assert not kernel_image._fits(package, replace(wanted, build=replace(BUILD, package="6.1.176-2")))
