"""Fabric manager and the like: what the vendor's documents say, where the files of archives go, what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from builds import components
from builds.cache import Cache
from builds.components import COMPONENTS, Component, Resolved
from builds.console import Reporter
from builds.errors import BuildError, ConfigurationError
from builds.model import Arch

VERSION = "570.172.08"
DOCUMENT = f"redistrib_{VERSION}.json"
BY_NAME = {component.name: component for component in COMPONENTS}

LAYOUTS: dict[str, tuple[str, ...]] = {
    "fabricmanager": (
        "LICENSE",
        "third-party-notices.txt",
        "bin/nv-fabricmanager",
        "bin/nvidia-fabricmanager-start.sh",
        "bin/nvswitch-audit",
        "etc/fabricmanager.cfg",
        "etc/fabricmanager_multinode.cfg",
        "include/nv_fm_agent.h",
        "include/nv_fm_types.h",
        "sbin/fm_run_package_installer.sh",
        "share/nvidia/nvswitch/dgxh100_hgxh100_topology",
        "share/nvidia/nvswitch/dgxgh200_hgxgh200_8gpus_topology",
        "systemd/nvidia-fabricmanager.service",
    ),
    "nvlsm": (
        "LICENSE",
        "third-party-notices.txt",
        "sbin/nvlsm",
        "share/nvidia/nvlsm/device_configuration.conf",
        "share/nvidia/nvlsm/grpc_mgr.conf",
        "share/nvidia/nvlsm/nvlsm.conf",
    ),
    "imex": (
        "LICENSE",
        "usr/bin/nvidia-imex",
        "usr/bin/nvidia-imex-ctl",
        "etc/nvidia-imex/config.cfg",
        "lib/systemd/system/nvidia-imex.service",
        "usr/share/doc/third-party-notices.txt",
    ),
}
"""Files of the vendor's archives, as those who repackage them list them; libraries apart, which must be ELF files."""


def tree_of(folder: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def layout(name: str, *more: str) -> dict[str, bytes]:
    return {path: f"{path} of {name}\n".encode() for path in (*LAYOUTS[name], *more)}


def placed(folder: Path, name: str) -> dict[str, str]:
    chosen = components.select(folder, BY_NAME[name], Arch.AMD64)
    assert {one.component for one in chosen} == {name}
    return {one.dest: str(one.source or f"-> {one.target}") for one in chosen}


def test_the_files_of_a_fabric_manager_are_placed_and_the_rest_is_dropped(tmp_path: Path) -> None:
    assert placed(tree_of(tmp_path, layout("fabricmanager")), "fabricmanager") == {
        "usr/bin/nv-fabricmanager": "bin/nv-fabricmanager",
        "usr/bin/nvidia-fabricmanager-start.sh": "bin/nvidia-fabricmanager-start.sh",
        "usr/bin/nvswitch-audit": "bin/nvswitch-audit",
        "usr/share/nvidia/fabricmanager/LICENSE": "LICENSE",
        "usr/share/nvidia/fabricmanager/third-party-notices.txt": "third-party-notices.txt",
        "usr/share/nvidia/nvswitch/dgxgh200_hgxgh200_8gpus_topology": (
            "share/nvidia/nvswitch/dgxgh200_hgxgh200_8gpus_topology"
        ),
        "usr/share/nvidia/nvswitch/dgxh100_hgxh100_topology": "share/nvidia/nvswitch/dgxh100_hgxh100_topology",
        "usr/share/nvidia/nvswitch/fabricmanager.cfg": "etc/fabricmanager.cfg",
        "usr/share/nvidia/nvswitch/fabricmanager_multinode.cfg": "etc/fabricmanager_multinode.cfg",
    }


def test_nvlsm_and_imex_are_placed(tmp_path: Path) -> None:
    assert set(placed(tree_of(tmp_path / "nvlsm", layout("nvlsm")), "nvlsm")) == {
        "usr/bin/nvlsm",
        "usr/share/nvidia/nvlsm/LICENSE",
        "usr/share/nvidia/nvlsm/third-party-notices.txt",
        "usr/share/nvidia/nvlsm/device_configuration.conf",
        "usr/share/nvidia/nvlsm/grpc_mgr.conf",
        "usr/share/nvidia/nvlsm/nvlsm.conf",
    }
    assert set(placed(tree_of(tmp_path / "imex", layout("imex")), "imex")) == {
        "usr/bin/nvidia-imex",
        "usr/bin/nvidia-imex-ctl",
        "etc/nvidia-imex/config.cfg",
        "usr/share/nvidia/imex/LICENSE",
        "usr/share/nvidia/imex/third-party-notices.txt",
    }


def test_programs_can_be_run_and_nothing_else(tmp_path: Path) -> None:
    chosen = components.select(tree_of(tmp_path, layout("imex")), BY_NAME["imex"], Arch.AMD64)
    assert {one.dest for one in chosen if one.mode == 0o755} == {"usr/bin/nvidia-imex", "usr/bin/nvidia-imex-ctl"}


def test_whatever_no_row_knows_is_named(tmp_path: Path) -> None:
    tree_of(tmp_path, layout("fabricmanager", "sbin/new-daemon", "bin/folder/tool", "lib/plugin.txt"))
    with pytest.raises(BuildError, match=r"bin/folder/tool, lib/plugin.txt, sbin/new-daemon\nhint: .*components\.py"):
        components.select(tmp_path, BY_NAME["fabricmanager"], Arch.AMD64)


@pytest.mark.parametrize("path", ["bin/nv-fabricmanager", "LICENSE"])
def test_an_archive_without_what_it_is_for_is_refused(path: str, tmp_path: Path) -> None:
    tree_of(tmp_path, layout("fabricmanager"))
    (tmp_path / path).unlink()
    with pytest.raises(BuildError, match="lacks what it is there for"):
        components.select(tmp_path, BY_NAME["fabricmanager"], Arch.AMD64)


def test_a_link_to_what_is_not_kept_is_refused(tmp_path: Path) -> None:
    tree_of(tmp_path, layout("imex"))
    (tmp_path / "usr/bin/imex").symlink_to("nvidia-imex")
    assert placed(tmp_path, "imex")["usr/bin/imex"] == "-> nvidia-imex"
    (tmp_path / "usr/bin/bad").symlink_to("../lib/nothing")
    with pytest.raises(BuildError, match=r"its target \.\./lib/nothing"):
        components.select(tmp_path, BY_NAME["imex"], Arch.AMD64)


def test_two_files_for_one_place_must_be_the_same(tmp_path: Path) -> None:
    files = layout("nvlsm")
    tree_of(tmp_path, {**files, "usr/share/nvidia/nvlsm/nvlsm.conf": files["share/nvidia/nvlsm/nvlsm.conf"]})
    assert "usr/share/nvidia/nvlsm/nvlsm.conf" in placed(tmp_path, "nvlsm")
    tree_of(tmp_path, {"usr/share/nvidia/nvlsm/nvlsm.conf": b"another"})
    with pytest.raises(BuildError, match=r"has two files for usr/share/nvidia/nvlsm/nvlsm\.conf"):
        components.select(tmp_path, BY_NAME["nvlsm"], Arch.AMD64)


def test_every_row_that_drops_says_why() -> None:
    rows = [row for component in COMPONENTS for row in component.rows]
    assert [row.pattern for row in rows if (row.dest is None) != bool(row.reason)] == []


# Documents and mirrors


def archive(files: Mapping[str, bytes], top: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz", preset=0) as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(f"{top}/{path}" if top else path)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


class Mirror:
    """A folder as the vendor's site has it, with the components of LAYOUTS."""

    def __init__(self, root: Path) -> None:
        self.root, self.document = root, {"release_date": "2026-01-01", "nvidia_driver": {"name": "not ours"}}
        self.entries: dict[str, dict[str, Any]] = {}
        for name in LAYOUTS:
            version = "2025.03.9" if name == "nvlsm" else VERSION
            self.add(name, version, layout(name))

    def add(self, name: str, version: str, files: Mapping[str, bytes], platform: str = "linux-x86_64") -> None:
        top = f"{name}-{platform}-{version}-archive"
        data = archive(files, top)
        path = f"{name}/{platform}/{top}.tar.xz"
        tree_of(self.root, {path: data})
        said = {"relative_path": path, "sha256": hashlib.sha256(data).hexdigest(), "md5": "", "size": str(len(data))}
        self.entries[name] = {"name": name, "license": "NVIDIA Driver", "version": version, platform: said}
        self.write()

    def write(self) -> None:
        (self.root / DOCUMENT).write_text(json.dumps({**self.document, **self.entries}))


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(tmp_path / "mirror")


def resolve(mirror: Mirror | None, tmp_path: Path, arch: Arch = Arch.AMD64) -> Resolved:
    base = str(mirror.root) if mirror else None
    return components.resolve(base, VERSION, arch, Cache(tmp_path / "cache"), Reporter())


def test_a_mirrors_components_are_unpacked_and_those_it_does_not_list_are_absent(
    mirror: Mirror, tmp_path: Path
) -> None:
    found = resolve(mirror, tmp_path)
    assert {name: one.version for name, one in found.listed.items()} == {
        "fabricmanager": VERSION,
        "nvlsm": "2025.03.9",
        "imex": VERSION,
    }
    assert found.absent == {"nscq": f"{DOCUMENT} does not list it"}
    for name, tree in found.trees.items():
        assert {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()} == {
            *LAYOUTS[name],
            ".sha256.json",
        }
        components.select(tree, BY_NAME[name], Arch.AMD64)


def test_no_source_no_document_and_no_platform_are_absent_by_rule_each_with_its_reason(
    mirror: Mirror, tmp_path: Path
) -> None:
    assert set(resolve(None, tmp_path).absent.values()) == {"there is no source for it: NVIDIA_REDIST_URL is `none`"}
    assert resolve(mirror, tmp_path, Arch.ARM64).absent["imex"] == (
        f"{DOCUMENT} lists it for other platforms than linux-sbsa"
    )
    (mirror.root / DOCUMENT).unlink()
    assert set(resolve(mirror, tmp_path).absent.items()) == {
        (component.name, f"its source has no {DOCUMENT}") for component in COMPONENTS
    }


@pytest.mark.parametrize("platform", ["linux-sbsa", "linux-aarch64"])
def test_servers_of_arm_have_two_names(platform: str, mirror: Mirror, tmp_path: Path) -> None:
    mirror.add("imex", VERSION, layout("imex"), platform)
    assert "imex" in resolve(mirror, tmp_path, Arch.ARM64).listed


def test_a_folder_that_is_not_there_is_no_absence(mirror: Mirror, tmp_path: Path) -> None:
    mirror.root = tmp_path / "typo"
    with pytest.raises(ConfigurationError, match="names no folder"):
        resolve(mirror, tmp_path)


def test_an_archive_that_is_listed_and_not_there_is_no_absence(mirror: Mirror, tmp_path: Path) -> None:
    next(mirror.root.glob("imex/*/*")).unlink()
    with pytest.raises(ConfigurationError, match="there is no such archive"):
        resolve(mirror, tmp_path)


def test_a_fabric_manager_of_another_version_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    mirror.add("fabricmanager", "570.172.07", layout("fabricmanager"))
    with pytest.raises(BuildError, match=rf"must be of the driver's version {VERSION}.*, got 570\.172\.07"):
        resolve(mirror, tmp_path)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte changed": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "its sha256 is"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its size is"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "its size is"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_archive_that_is_not_what_is_listed_is_refused(case: str, mirror: Mirror, tmp_path: Path) -> None:
    spoil, said = SPOILED[case]
    spoil(next(mirror.root.glob("nvlsm/*/*")))
    with pytest.raises(BuildError, match=said):
        resolve(mirror, tmp_path)
    mirror.add("nvlsm", "2025.03.9", layout("nvlsm"))
    assert "nvlsm" in resolve(mirror, tmp_path).listed


@pytest.mark.parametrize(
    "text",
    ["<!DOCTYPE html>", "[]", "[" * 200_000, '{"imex": 1}', '{"imex": {"version": "1", "linux-x86_64": []}}'],
    ids=["a web page", "a list", "deeper than can be read", "no component", "no archive"],
)
def test_a_document_that_is_none_is_refused(text: str, mirror: Mirror, tmp_path: Path) -> None:
    (mirror.root / DOCUMENT).write_text(text)
    with pytest.raises(BuildError, match=DOCUMENT):
        resolve(mirror, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("relative_path", "../out.tar.xz"),
        ("relative_path", "/etc/passwd"),
        ("relative_path", "imex/../../out.tar.xz"),
        ("relative_path", "http://elsewhere/a.tar.xz"),
        ("relative_path", 5),
        ("sha256", "123"),
        ("sha256", int("1" * 64)),
        ("size", "0"),
        ("size", None),
    ],
)
def test_what_an_entry_may_not_say_is_named(key: str, value: object, mirror: Mirror, tmp_path: Path) -> None:
    mirror.entries["imex"]["linux-x86_64"][key] = value
    mirror.write()
    with pytest.raises(BuildError, match=f"imex: is not listed as an archive should be, got {key}"):
        resolve(mirror, tmp_path)


def _tar(members: Sequence[tuple[str, Mapping[str, object]]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz", preset=0) as tar:
        for name, fields in members:
            info = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info)
    return stream.getvalue()


def _evil(name: str, **fields: object) -> bytes:
    return _tar([(name, fields)])


BAD_ARCHIVES = {
    "leads out": _evil("top/../../out"),
    "absolute": _evil("/out"),
    "a link that leads out": _evil("top/link", type=tarfile.SYMTYPE, linkname="../../out"),
    "a device": _evil("top/null", type=tarfile.CHRTYPE),
    "a hard link to nothing": _evil("top/link", type=tarfile.LNKTYPE, linkname="top/none"),
    "a time that no file can have": _evil("top/file", mtime=1 << 80),
    "a file in a file": _tar([("top/a", {}), ("top/a/b", {})]),
    "no archive": b"<!DOCTYPE html>",
    "cut short": archive({"LICENSE": b"x" * 100_000}, "top")[:-40],
    "several folders": archive({"one/a": b"", "two/b": b""}, ""),
    "no folder": archive({"LICENSE": b"x"}, ""),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_a_bad_archive_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar.xz").write_bytes(BAD_ARCHIVES[case])
    (tmp_path / "in").mkdir()
    with pytest.raises(BuildError, match=r"a\.tar\.xz"):
        components.unpack(tmp_path / "a.tar.xz", tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_a_damaged_unpacked_archive_is_unpacked_again(mirror: Mirror, tmp_path: Path) -> None:
    tree = resolve(mirror, tmp_path).trees["imex"]
    (tree / "LICENSE").write_text("changed")
    assert (resolve(mirror, tmp_path).trees["imex"] / "LICENSE").read_bytes() == layout("imex")["LICENSE"]


def test_the_components_are_named_once() -> None:
    names = [name for component in COMPONENTS for name in component.listed]
    assert len(names) == len(set(names))
    assert all(isinstance(component, Component) for component in COMPONENTS)
