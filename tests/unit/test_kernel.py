"""What is read of a kmodbuild image, and which images are refused."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from builds.errors import BuildError
from builds.kernel import read_kernel
from builds.model import Arch, Flavor
from builds.rootfs import Node, RootFs

VERSION_H = """\
#define LINUX_VERSION_CODE 396543
#define LINUX_VERSION_MAJOR 6
#define LINUX_VERSION_PATCHLEVEL 12
#define LINUX_VERSION_SUBLEVEL 344
"""


def headers(release: str, package: str, *, arch: str = "X86_64", config: str = "") -> dict[str, str]:
    """A flavour's headers as a package lays them down, and the package itself."""
    folder = f"usr/src/linux-headers-{release}"
    return {
        f"{folder}/Module.symvers": f"0x1234\tsymbol\t{release}\tEXPORT_SYMBOL\t\n",
        f"{folder}/.config": config,
        f"{folder}/Makefile": "include /usr/src/linux-headers-common/Makefile\n",
        f"{folder}/include/config/auto.conf": f"CONFIG_{arch}=y\nCONFIG_MODVERSIONS=y\n{config}",
        f"{folder}/include/generated/utsrelease.h": f'#define UTS_RELEASE "{release}"\n',
        f"{folder}/include/generated/uapi/linux/version.h": VERSION_H,
        f"var/lib/dpkg/info/linux-headers-{release}.list": f"/.\n/{folder}/Module.symvers\n",
        f"var/lib/dpkg/status/{release}": f"Package: linux-headers-{release}\nVersion: {package}\n\n",
    }


def rootfs(tmp_path: Path, *packages: Mapping[str, str]) -> RootFs:
    files: dict[str, str] = {}
    status = "Package: gcc-14\nVersion: 14.2.0-19\n\nPackage: bash\nVersion: 5.2\n\n"
    for package in packages:
        for path, text in package.items():
            if path.startswith("var/lib/dpkg/status/"):
                status += text
            else:
                files[path] = text
    files["var/lib/dpkg/status"] = status
    nodes: dict[str, Node] = {}
    blob = tmp_path / "blob"
    with blob.open("wb") as stream:
        for path, text in files.items():
            for parent in list(Path(path).parents)[:-1]:
                nodes[str(parent)] = Node(str(parent), stat.S_IFDIR | 0o755, 0, 0, 0, 0, "", 0, blob, 0)
            offset, data = stream.tell(), text.encode()
            stream.write(data)
            nodes[path] = Node(path, stat.S_IFREG | 0o644, 0, 0, 0, len(data), "", 0, blob, offset)
    return RootFs(nodes)


CLOUD = headers("6.12.344-cloud-amd64", "6.12.344-3gl0")
METAL = headers("6.12.344-amd64", "6.12.344-3gl0", config="CONFIG_DRM=m\n")


def test_the_flavour_decides_which_headers(tmp_path: Path) -> None:
    image = rootfs(tmp_path, CLOUD, METAL)
    cloud, symvers = read_kernel(image, Arch.AMD64, Flavor.CLOUD, "amd64")
    metal, _ = read_kernel(image, Arch.AMD64, Flavor.BAREMETAL, "amd64")
    assert (cloud.build.release, metal.build.release) == ("6.12.344-cloud-amd64", "6.12.344-amd64")
    assert (cloud.drm, metal.drm) == (False, True)
    assert b"6.12.344-cloud-amd64" in symvers


def test_what_is_read(tmp_path: Path) -> None:
    kernel, _ = read_kernel(rootfs(tmp_path, CLOUD), Arch.AMD64, Flavor.CLOUD, "amd64")
    assert kernel.build.version == "6.12.344", "LINUX_VERSION_CODE would say 255"
    assert kernel.build.package == "6.12.344-3gl0"
    assert kernel.build.modversions
    assert kernel.source == "/usr/src/linux-headers-common"
    assert kernel.output == "/usr/src/linux-headers-6.12.344-cloud-amd64"
    assert kernel.compiler == {"gcc-14": "14.2.0-19"}


TOOLS = ("gcc-14", "ld", "strip")
ARM = headers("6.12.344-cloud-arm64", "6.12.344-3gl0", arch="ARM64")


def tools(prefix: str, *names: str) -> dict[str, str]:
    return {f"usr/bin/{prefix}{name}": "" for name in names}


@pytest.mark.parametrize(
    ("runs_on", "there", "cross"),
    [
        ("arm64", tools("", *TOOLS), ""),
        ("amd64", tools("aarch64-linux-gnu-", *TOOLS), "aarch64-linux-gnu-"),
        ("amd64", tools("aarch64-linux-gnu-", "gcc", "ld", "strip"), "aarch64-linux-gnu-"),
        # an image of the kernel's own architecture needs no prefix, whatever else lies there
        ("arm64", tools("aarch64-linux-gnu-", *TOOLS), ""),
    ],
    ids=["its own", "cross, of a version", "cross", "its own, with a prefix"],
)
def test_the_image_says_how_modules_are_compiled(
    runs_on: str, there: Mapping[str, str], cross: str, tmp_path: Path
) -> None:
    kernel, _ = read_kernel(rootfs(tmp_path, ARM, there), Arch.ARM64, Flavor.CLOUD, runs_on)
    assert kernel.cross == cross


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        (tools("", *TOOLS), "no aarch64-linux-gnu-gcc, no aarch64-linux-gnu-ld, no aarch64-linux-gnu-strip"),
        (tools("aarch64-linux-gnu-", "gcc-ar", "ld", "strip"), "no aarch64-linux-gnu-gcc"),
        (tools("aarch64-linux-gnu-", "gcc-14"), "no aarch64-linux-gnu-ld, no aarch64-linux-gnu-strip"),
    ],
)
def test_an_image_of_another_architecture_without_its_tools_is_refused(
    there: Mapping[str, str], lacking: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match="is of amd64 and cannot compile for arm64") as caught:
        read_kernel(rootfs(tmp_path, ARM, there), Arch.ARM64, Flavor.CLOUD, "amd64")
    assert caught.value.got == lacking


def test_two_builds_of_one_release_name_differ(tmp_path: Path) -> None:
    other = headers("6.12.344-cloud-amd64", "6.12.344-3gl2", config="CONFIG_X=y\n")
    (tmp_path / "other").mkdir()
    one, _ = read_kernel(rootfs(tmp_path, CLOUD), Arch.AMD64, Flavor.CLOUD, "amd64")
    two, _ = read_kernel(rootfs(tmp_path / "other", other), Arch.AMD64, Flavor.CLOUD, "amd64")
    assert one.build.release == two.build.release
    assert one.build.id != two.build.id


@pytest.mark.parametrize(
    ("packages", "arch", "said"),
    [
        ((), Arch.AMD64, "no headers at all"),
        ((METAL,), Arch.AMD64, "none among 6.12.344-amd64"),
        ((CLOUD, headers("6.12.345-cloud-amd64", "1")), Arch.AMD64, "6.12.344-cloud-amd64, 6.12.345-cloud-amd64"),
        ((CLOUD,), Arch.ARM64, "none among 6.12.344-cloud-amd64"),
    ],
)
def test_an_image_without_just_one_candidate_is_refused(
    packages: tuple[Mapping[str, str], ...], arch: Arch, said: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match="must have the headers of exactly one") as caught:
        read_kernel(rootfs(tmp_path, *packages), arch, Flavor.CLOUD, "amd64")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("status", "there"),
    [("install ok installed", True), ("install ok unpacked", True), ("deinstall ok config-files", False)],
)
def test_headers_need_no_more_than_to_be_unpacked(status: str, there: bool, tmp_path: Path) -> None:
    said = {path: text.replace("Version:", f"Status: {status}\nVersion:") for path, text in CLOUD.items()}
    image = rootfs(tmp_path, said)
    if there:
        kernel, _ = read_kernel(image, Arch.AMD64, Flavor.CLOUD, "amd64")
        assert kernel.build.package == "6.12.344-3gl0"
    else:
        with pytest.raises(BuildError, match="belongs to no package"):
            read_kernel(image, Arch.AMD64, Flavor.CLOUD, "amd64")


def test_headers_of_no_package_are_refused(tmp_path: Path) -> None:
    stray = {path: text for path, text in CLOUD.items() if not path.startswith("var/")}
    with pytest.raises(BuildError, match="belongs to no package"):
        read_kernel(rootfs(tmp_path, stray), Arch.AMD64, Flavor.CLOUD, "amd64")


def test_headers_listed_as_before_the_merge_of_usr_have_their_package(tmp_path: Path) -> None:
    files = {path.replace("usr/src/linux-headers-", "usr/lib/modules/"): text for path, text in CLOUD.items()}
    files = {
        path: text.replace("/usr/src/linux-headers-6.12.344-c", "/lib/modules/6.12.344-c")
        for path, text in files.items()
    }
    build = "usr/lib/modules/6.12.344-cloud-amd64"
    image = rootfs(tmp_path, files)
    link = image.nodes[build]
    nodes = {
        **image.nodes,
        f"{build}/build": replace(link, path=f"{build}/build", mode=stat.S_IFLNK | 0o777, target="."),
    }
    kernel, _ = read_kernel(RootFs(nodes), Arch.AMD64, Flavor.CLOUD, "amd64")
    assert kernel.build.package == "6.12.344-3gl0"


def test_broken_headers_beside_sound_ones_do_no_harm(tmp_path: Path) -> None:
    broken = {path: text for path, text in METAL.items() if not path.endswith("auto.conf")}
    kernel, _ = read_kernel(rootfs(tmp_path, CLOUD, broken), Arch.AMD64, Flavor.CLOUD, "amd64")
    assert kernel.build.release == "6.12.344-cloud-amd64"
