"""The image as it is stored: blobs that are what their digests say, layers that hide and change nothing."""

from __future__ import annotations

import hashlib
import posixpath
import re
import stat

import pytest

from builds import oci, paths
from builds.errors import BuildError

from .conftest import Compare
from .evidence import Expected, Found, frames

_MAGIC = {
    b"\x28\xb5\x2f\xfd": oci.LAYER_ZSTD,
    b"\x1f\x8b": oci.LAYER_GZIP,
}
"""First bytes of a compressed layer, and what it is to be called."""

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


@pytest.mark.check("layers.media-types")
def test_media_types(found: Found, compare: Compare) -> None:
    """Each blob is what it is called: a runtime unpacks a layer by its name, not by its bytes."""
    layout, wanted = found.image.layout, []
    for layer in found.image.layers:
        with oci.blob_path(layout, layer.descriptor.digest).open("rb") as stream:
            head = stream.read(4)
        wanted.append(next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), oci.LAYER_TAR))
    manifest = found.image.manifest
    compare([layer["mediaType"] for layer in manifest["layers"]], wanted)
    compare([manifest.get("mediaType"), manifest["config"]["mediaType"]], [oci.MANIFEST, oci.CONFIG])


@pytest.mark.check("layers.readable")
def test_readable(opened: Found | str, compare: Compare) -> None:
    """Every layer can be unpacked."""
    compare(opened if isinstance(opened, str) else "", "")


@pytest.mark.check("layers.streams")
def test_streams(image: oci.Image, expected: Expected, compare: Compare) -> None:
    """Compressed layers are whole streams and nothing else: every runtime unpacks them, and alike."""
    odd = []
    for layer in image.layers:
        descriptor = layer.descriptor
        if descriptor.media_type == oci.LAYER_TAR or descriptor.digest in expected.subject.base_blobs:
            continue  # what the base image brings is as its makers made it
        with oci.blob_path(image.layout, descriptor.digest).open("rb") as blob:
            odd += [f"{descriptor.digest[:19]}: {what}" for what in frames(blob)]
    compare(odd, [])


@pytest.mark.check("layers.bytes")
@pytest.mark.parametrize("name", ["user space", "modules", "installer"])
def test_bytes(name: str, found: Found, compare: Compare) -> None:
    """A layer is the archive that packing makes of its content, to the bit: the same on every machine.

    So there is nothing in it that one reader of archives sees and another does not.
    """
    ours = [layer.diff_id for layer in found.layers[found.bases :]]
    wanted = found.parts
    at = list(wanted).index(name)
    compare(ours[at] if at < len(ours) else None, wanted[name], "diff id: not what packing makes of its content")


@pytest.mark.check("layers.manifest")
def test_manifest(image: oci.Image, compare: Compare) -> None:
    """It says what the image is made of and nothing else: no annotations, no blobs from foreign places."""
    manifest = image.manifest
    compare(sorted(manifest), ["config", "layers", "mediaType", "schemaVersion"])
    compare(repr(manifest["schemaVersion"]), "2")
    more = {name for blob in (manifest["config"], *manifest["layers"]) for name in blob}
    compare(more, {"digest", "mediaType", "size"})


@pytest.mark.check("layers.index")
def test_index(image: oci.Image, expected: Expected, compare: Compare) -> None:
    """The layout says of the image what is true, and nothing else: tools choose and copy by it."""
    try:
        layout = oci.parse_json((image.layout / "oci-layout").read_bytes())
        index = oci.parse_json((image.layout / "index.json").read_bytes())
    except (OSError, ValueError) as error:
        raise BuildError("layout", "oci-layout or index.json is no plain JSON", got=str(error)) from error
    compare(layout, {"imageLayoutVersion": "1.0.0"})
    compare([index.get("schemaVersion"), index.get("mediaType", oci.INDEX)], [2, oci.INDEX])
    size = oci.blob_path(image.layout, image.digest).stat().st_size
    said = [entry for entry in index["manifests"] if entry.get("digest") == image.digest]
    platform = {"architecture": str(expected.plan.cell.arch), "os": "linux"}
    for entry in said:
        more = {name: value for name, value in entry.items() if name not in ("annotations", "platform")}
        compare(more, {"mediaType": oci.MANIFEST, "digest": image.digest, "size": size})
        compare(entry.get("platform") or platform, platform)


@pytest.mark.check("layers.order")
def test_order(found: Found, compare: Compare) -> None:
    """Above the base: user space, modules, installer, a layer each, so that images share what they have in common."""
    told = [
        sorted({_part(member.name) for member in layer.members if not member.isdir()})
        for layer in found.layers[found.bases :]
    ]
    compare(told, [["user space"], ["modules"], ["installer"]])


@pytest.mark.check("layers.kinds")
def test_kinds(found: Found, compare: Compare) -> None:
    """Files, folders and symlinks only, under plain names: no devices, no hard links, nothing that leads elsewhere."""
    members = found.members
    compare(bool(members), True, "there is nothing above the base")
    odd = [member.name for member in members if not (member.isreg() or member.isdir() or member.issym())]
    compare(odd + [member.name for member in members if member.name != _plain(member.name)], [])


@pytest.mark.check("layers.attributes")
def test_attributes(found: Found, compare: Compare) -> None:
    """No extended attributes: a capability is as good as setuid, and access lists go round the permissions."""
    members = found.members
    compare(bool(members), True, "there is nothing above the base")
    said = {f"{member.name} {key}" for member in members for key in member.pax_headers}
    compare([text for text in said if re.search(r" .*(xattr|acl)", text, re.IGNORECASE)], [])


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
    foreign = [
        f"{member.name} {member.uid}:{member.gid} {member.uname}:{member.gname}"
        for member in members
        if (member.uid, member.gid) != (0, 0) or not {member.uname, member.gname} <= {"", "root"}
    ]
    compare(foreign, [])


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


@pytest.mark.check("layers.modes")
def test_modes(found: Found, compare: Compare) -> None:
    """What everybody on the node and in its containers must read, everybody may read; nobody but root may write."""
    members = [member for member in found.members if not member.issym()]
    compare(bool(members), True, "there is nothing above the base")
    allowed = {True: (0o755,), False: (0o644, 0o755)}
    odd = [f"{one.name} {oct(one.mode)}" for one in members if one.mode & 0o7777 not in allowed[one.isdir()]]
    compare(odd, [])


@pytest.mark.check("layers.places")
def test_places(found: Found, compare: Compare) -> None:
    """Everything above the base is in a place of ours."""
    elsewhere = [
        node.path
        for node in found.ours()
        if not node.is_dir and node.path != paths.ENTRYPOINT and not node.path.startswith(tuple(f"{o}/" for o in _OURS))
    ]
    compare(elsewhere, [])


def _plain(name: str) -> str:
    """A name without what means nothing, or leads elsewhere."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _part(name: str) -> str:
    """Which part of an image a path belongs to."""
    path = _plain(name)
    places = {"user space": paths.DRIVER_ROOT, "modules": paths.MODULES, "installer": paths.INSTALLER}
    if path == paths.ENTRYPOINT:
        return "installer"
    return next((part for part, place in places.items() if path.startswith(f"{place}/")), f"/{path}")
