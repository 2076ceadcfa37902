"""Layers are applied as a runtime applies them: replaced, hidden, linked."""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from builds import layers as packing
from builds import oci
from builds.errors import BuildError
from builds.model import Arch
from builds.rootfs import RootFs, open_rootfs

Member = tuple[str, bytes, str]
"""Name, tar's type, and content of a file or target of a link."""

FILE, DIR, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def image(folder: Path, *layers: Sequence[Member]) -> oci.Image:
    """An image whose layers have just these members, in this order."""
    layout = folder / "layout"
    oci.create(layout)
    made = []
    for number, members in enumerate(layers):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, kind, text in members:
                info = tarfile.TarInfo(name)
                info.type, info.mode = kind, 0o755
                if kind == FILE:
                    info.size = len(text)
                elif kind in (LINK, HARD):
                    info.linkname = text
                archive.addfile(info, io.BytesIO(text.encode()))
        tar = folder / f"{number}.tar"
        tar.write_bytes(stream.getvalue())
        layer = packing.layer_from_tar(tar, folder / f"{number}.layer")
        oci.add_layer(layout, layer, folder / f"{number}.layer")
        made.append(layer)
    return oci.add_image(layout, made, arch=Arch.AMD64, names=["x:y"])


def paths(rootfs: RootFs) -> list[str]:
    return sorted(rootfs.nodes)


def test_the_highest_layer_wins(tmp_path: Path) -> None:
    with open_rootfs(image(tmp_path, [("a", FILE, "old")], [("./a", FILE, "newer")])) as rootfs:
        assert paths(rootfs) == ["a"]
        assert rootfs.read("a") == b"newer"
        assert (rootfs.nodes["a"].layer, rootfs.nodes["a"].size) == (1, 5)
        assert stat.S_IMODE(rootfs.nodes["a"].mode) == 0o755


def test_a_whiteout_hides_a_file_and_a_folder(tmp_path: Path) -> None:
    below = [("d", DIR, ""), ("d/x", FILE, "x"), ("d/y", FILE, "y"), ("e", DIR, ""), ("e/z", FILE, "z")]
    with open_rootfs(image(tmp_path, below, [("d/.wh.x", FILE, ""), (".wh.e", FILE, "")])) as rootfs:
        assert paths(rootfs) == ["d", "d/y"]


def test_an_opaque_folder_hides_what_is_below_but_not_beside(tmp_path: Path) -> None:
    below = [("d", DIR, ""), ("d/x", FILE, "x"), ("dd", FILE, "")]
    above = [("d", DIR, ""), ("d/new", FILE, "n"), ("d/.wh..wh..opq", FILE, "")]
    with open_rootfs(image(tmp_path, below, above)) as rootfs:
        assert paths(rootfs) == ["d", "d/new", "dd"]


def test_a_whiteout_does_not_hide_its_own_layer(tmp_path: Path) -> None:
    with open_rootfs(image(tmp_path, [("a", FILE, "1")], [("a", FILE, "2"), (".wh.a", FILE, "")])) as rootfs:
        assert rootfs.read("a") == b"2"


def test_a_file_replaces_a_folder_whole(tmp_path: Path) -> None:
    with open_rootfs(image(tmp_path, [("d", DIR, ""), ("d/x", FILE, "x")], [("d", FILE, "now a file")])) as rootfs:
        assert paths(rootfs) == ["d"]


def test_a_folder_is_merged(tmp_path: Path) -> None:
    with open_rootfs(
        image(tmp_path, [("d", DIR, ""), ("d/x", FILE, "x")], [("d", DIR, ""), ("d/y", FILE, "")])
    ) as rootfs:
        assert paths(rootfs) == ["d", "d/x", "d/y"]


def test_a_path_through_a_link_lands_where_the_link_points(tmp_path: Path) -> None:
    below = [("usr", DIR, ""), ("usr/lib", DIR, ""), ("lib", LINK, "usr/lib")]
    with open_rootfs(image(tmp_path, below, [("lib/a", FILE, "a")])) as rootfs:
        assert "usr/lib/a" in rootfs.nodes
        assert rootfs.nodes["lib"].is_link
        assert rootfs.read("lib/a") == b"a"


def test_hard_links_share_content(tmp_path: Path) -> None:
    with open_rootfs(image(tmp_path, [("a", FILE, "same"), ("b", HARD, "a")])) as rootfs:
        assert rootfs.read("b") == b"same"
        assert rootfs.nodes["b"].path == "b"


def test_a_hard_link_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="hard link to nothing"), open_rootfs(image(tmp_path, [("b", HARD, "a")])):
        pass


def test_links_are_followed_inside_the_root(tmp_path: Path) -> None:
    members = [
        *[("r", DIR, ""), ("r/real", FILE, "in"), ("real", FILE, "out"), ("r/d", DIR, "")],
        *[("r/abs", LINK, "/real"), ("r/up", LINK, "../../real"), ("r/d/near", LINK, "../real")],
        *[("r/loop", LINK, "loop"), ("r/dangling", LINK, "nothing"), ("r/chain", LINK, "d/near")],
    ]
    with open_rootfs(image(tmp_path, members)) as rootfs:
        for name in ("abs", "up", "d/near", "chain"):
            node = rootfs.resolve(name, "r")
            assert node, name
            assert node.path == "r/real", name
        assert rootfs.resolve("loop", "r") is None
        assert rootfs.resolve("dangling", "r") is None
        outer = rootfs.resolve("r/abs")
        assert outer
        assert outer.path == "real"
        with pytest.raises(BuildError, match="/r/dangling: is not a file"):
            rootfs.read("r/dangling")
        with pytest.raises(BuildError, match="is not a file"):
            rootfs.read("r/d")


def test_below_is_sorted_and_strict(tmp_path: Path) -> None:
    members = [("d", DIR, ""), ("d/b", FILE, ""), ("d/a", FILE, ""), ("dx", FILE, "")]
    with open_rootfs(image(tmp_path, members)) as rootfs:
        assert [node.path for node in rootfs.below("d")] == ["d/a", "d/b"]
        assert list(rootfs.below("nothing")) == []


def test_scratch_is_left_empty(tmp_path: Path) -> None:
    made = image(tmp_path, [("a", FILE, "1")])
    with open_rootfs(made, tmp_path / "scratch"):
        assert any((tmp_path / "scratch").iterdir())
    assert not any((tmp_path / "scratch").iterdir())
