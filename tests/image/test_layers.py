"""The image as it is stored: blobs that are what their digests say, layers that hide and change nothing."""

from __future__ import annotations

import hashlib
import posixpath
import stat

import pytest

from builds import oci, paths
from builds.errors import BuildError

from .conftest import Compare
from .evidence import Found

_OURS = (paths.DRIVER_ROOT, paths.MODULES, paths.INSTALLER)


@pytest.mark.check("layers.blobs")
def test_blobs(image: oci.Image, compare: Compare) -> None:
    """Manifest, config and layers have the bytes and the sizes that whoever refers to them says."""
    blobs = [image.descriptor, image.config_descriptor, *(layer.descriptor for layer in image.layers)]
    wanted = {blob.digest: blob.size for blob in blobs}
    have = {}
    for digest in wanted:
        path = oci.blob_path(image.layout, digest)
        if not path.is_file():
            raise BuildError("layout", f"has no blob {digest}")
        with path.open("rb") as stream:
            have[f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"] = path.stat().st_size
    compare(have, wanted)


@pytest.mark.check("layers.diff-ids")
def test_diff_ids(found: Found, compare: Compare) -> None:
    compare([layer.diff_id for layer in found.layers], found.image.config["rootfs"]["diff_ids"])


@pytest.mark.check("layers.base")
def test_base(found: Found, compare: Compare) -> None:
    """The lowest layers are the base image's: so images share them, and nobody has changed the userland."""
    base = found.expected.subject.base
    compare([layer.diff_id for layer in found.layers[: len(base)]], base)


@pytest.mark.check("layers.whiteouts")
def test_whiteouts(found: Found, compare: Compare) -> None:
    """No layer of ours hides anything of a lower one."""
    members = found.members
    compare(bool(members), True, "there is nothing above the base")
    compare([member.name for member in members if posixpath.basename(member.name).startswith(".wh.")], [])


@pytest.mark.check("layers.replaced")
def test_replaced(found: Found, compare: Compare) -> None:
    """No file stands twice, and no folder replaces a file or link of the base: only folders may meet."""
    seen: dict[str, bool] = {}
    replaced = []
    for number, layer in enumerate(found.layers):
        for member in layer.members:
            name = posixpath.normpath(member.name).lstrip("/")
            if number >= found.bases and name in seen and not (member.isdir() and seen[name]):
                replaced.append(name)
            seen[name] = member.isdir()
    compare(bool(seen), True, "the layers are empty")
    compare(replaced, [])


@pytest.mark.check("layers.owner")
def test_owner(found: Found, compare: Compare) -> None:
    members = found.members
    compare(bool(members), True, "there is nothing above the base")
    compare(
        [f"{member.name} {member.uid}:{member.gid}" for member in members if (member.uid, member.gid) != (0, 0)], []
    )


@pytest.mark.check("layers.times")
def test_times(found: Found, compare: Compare) -> None:
    """A fixed time, or the same plan would not give the same digest."""
    members = found.members
    compare(bool(members), True, "there is nothing above the base")
    compare([f"{member.name} {member.mtime}" for member in members if member.mtime != oci.EPOCH], [])


@pytest.mark.check("layers.permissions")
def test_permissions(found: Found, compare: Compare) -> None:
    """No setuid, no setgid, nothing that everybody may write."""
    forbidden = stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH
    compare(bool(found.ours()), True, "there is nothing above the base")
    compare(
        [f"{node.path} {oct(node.mode)}" for node in found.ours() if node.mode & forbidden and not node.is_link],
        [],
    )


@pytest.mark.check("layers.places")
def test_places(found: Found, compare: Compare) -> None:
    """Everything above the base is in a place of ours."""
    elsewhere = [
        node.path
        for node in found.ours()
        if not node.is_dir and node.path != paths.ENTRYPOINT and not node.path.startswith(tuple(f"{o}/" for o in _OURS))
    ]
    compare(elsewhere, [])
