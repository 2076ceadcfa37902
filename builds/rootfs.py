"""The file system of an image, read from its layers without unpacking or running it.

Layers are applied as a runtime applies them: later entries replace earlier ones, whiteouts (``.wh.<name>``,
``.wh..wh..opq``) hide them, a path that leads through a symlink lands where the symlink points.
"""

from __future__ import annotations

import posixpath
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from . import oci
from .cache import CHUNK, disk_errors, scratch
from .errors import BuildError

_MAX_LINKS = 40  # as the kernel's MAXSYMLINKS


@dataclass(frozen=True)
class Node:
    """A file, folder, symlink or device of an image, with what its last layer says of it."""

    path: str
    """Relative to the root of the image, without a leading slash."""
    mode: int
    """Type and permissions, as ``st_mode``."""
    uid: int
    gid: int
    mtime: int
    """Seconds since 1970."""
    size: int
    """Bytes of a file, 0 for anything else."""
    target: str
    """Target of a symlink."""
    layer: int
    """Number of the layer that has it, 0 the lowest."""
    _tar: Path
    _offset: int

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symlink."""
        return stat.S_ISLNK(self.mode)

    def read(self) -> bytes:
        """Content of a file."""
        with self._tar.open("rb") as stream:
            stream.seek(self._offset)
            return stream.read(self.size)


@dataclass(frozen=True)
class RootFs:
    """The flattened file system of an image."""

    nodes: Mapping[str, Node]

    def resolve(self, path: str, root: str = "") -> Node | None:
        """The node that a path means when its symlinks are followed inside ``root``, as after a chroot to it.

        ``None`` where it does not exist, or its links go round in circles.
        """
        todo = [part for part in path.split("/") if part]
        done: list[str] = []
        links = 0
        while todo:
            part = todo.pop(0)
            if part == ".":
                continue
            if part == "..":
                done = done[:-1]
                continue
            node = self.nodes.get(posixpath.join(root, *done, part))
            if node is None:
                return None
            if not node.is_link:
                done.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                return None
            if node.target.startswith("/"):
                done = []
            todo = [part for part in node.target.split("/") if part] + todo
        return self.nodes.get(posixpath.join(root, *done))

    def below(self, folder: str) -> Iterator[Node]:
        """Everything below a folder, sorted by path; nothing where the folder is missing."""
        prefix = f"{folder.rstrip('/')}/"
        return (self.nodes[path] for path in sorted(self.nodes) if path.startswith(prefix))

    def read(self, path: str) -> bytes:
        """Content of the file that a path means. Raises BuildError where there is none."""
        node = self.resolve(path)
        if node is None or not node.is_file:
            raise BuildError(f"/{path}", "is not a file of the image", got="nothing" if node is None else "no file")
        return node.read()


@contextmanager
def open_rootfs(image: oci.Image, place: Path | None = None) -> Iterator[RootFs]:
    """The file system of an image; its layers lie uncompressed in a temporary folder below ``place`` meanwhile."""
    with scratch(place or Path(tempfile.gettempdir())) as folder:
        nodes: dict[str, Node] = {}
        for number, layer in enumerate(image.layers):
            tar = folder / f"{number}.tar"
            if layer.descriptor.digest == layer.diff_id:  # it lies there uncompressed
                tar = oci.blob_path(image.layout, layer.diff_id)
            else:
                with disk_errors("layer", tar), oci.open_layer(image.layout, layer.descriptor) as stream:
                    _spill(stream, tar)
            _apply(nodes, tar, number)
        yield RootFs(nodes)


def _spill(stream: IO[bytes], target: Path) -> None:
    with target.open("wb") as file:
        while chunk := stream.read(CHUNK):
            file.write(chunk)


def _apply(nodes: dict[str, Node], tar: Path, number: int) -> None:
    """Apply a layer: first what it hides of the layers below, then what it brings."""
    try:
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
    except tarfile.TarError as error:
        raise BuildError(f"layer {number}", "is not a readable tar", got=str(error)) from error
    for member in members:
        folder, name = posixpath.split(_clean(member.name))
        if name == ".wh..wh..opq":
            _hide(nodes, folder, itself=False)
        elif name.startswith(".wh."):
            _hide(nodes, posixpath.join(folder, name.removeprefix(".wh.")), itself=True)
    for member in members:
        path = _clean(member.name)
        if not path or posixpath.basename(path).startswith(".wh."):
            continue
        folder, name = posixpath.split(path)
        parent = RootFs(nodes).resolve(folder)
        path = posixpath.join(parent.path, name) if parent else path
        if member.islnk():
            original = nodes.get(_clean(member.linkname))
            if original is None:
                raise BuildError(f"layer {number}", "has a hard link to nothing", got=f"{path} -> {member.linkname}")
            nodes[path] = replace(original, path=path, layer=number)
            continue
        if not member.isdir():
            _hide(nodes, path, itself=False)
        nodes[path] = Node(
            path,
            _mode(member),
            member.uid,
            member.gid,
            int(member.mtime),
            member.size if member.isfile() else 0,
            member.linkname if member.issym() else "",
            number,
            tar,
            member.offset_data,
        )


def _clean(name: str) -> str:
    path = posixpath.normpath(name).lstrip("/")
    return "" if path == "." else path


def _hide(nodes: dict[str, Node], path: str, *, itself: bool) -> None:
    """Forget what lies below a path, and the path as well if ``itself``."""
    if itself or (path in nodes and nodes[path].is_dir) or not path:
        prefix = f"{path}/" if path else ""
        for known in [known for known in nodes if known.startswith(prefix)]:
            del nodes[known]
    if itself:
        nodes.pop(path, None)


def _mode(member: tarfile.TarInfo) -> int:
    kinds = {
        tarfile.DIRTYPE: stat.S_IFDIR,
        tarfile.SYMTYPE: stat.S_IFLNK,
        tarfile.CHRTYPE: stat.S_IFCHR,
        tarfile.BLKTYPE: stat.S_IFBLK,
        tarfile.FIFOTYPE: stat.S_IFIFO,
    }
    return kinds.get(member.type, stat.S_IFREG) | member.mode
