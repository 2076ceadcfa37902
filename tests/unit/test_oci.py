"""Layers are deterministic, layouts whole, and damage is found."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import tarfile
from pathlib import Path

import pytest

from builds import layers, oci
from builds.errors import BuildError, ConfigurationError
from builds.layers import Entry
from builds.model import Arch

ENTRIES = [
    Entry("usr/bin/tool", "file", 0o755, b"#!/bin/sh\n"),
    Entry("usr/lib/libx.so.1", "symlink", target="libx.so.1.2"),
    Entry("usr/lib/libx.so.1.2", "file", 0o644, bytes(200_000)),
    Entry("etc/empty", "dir", 0o700),
    Entry("naïve/" + "long" * 40, "file", 0o644, "é".encode()),
]


def layer(folder: Path, entries: list[Entry], name: str = "layer") -> oci.Layer:
    return layers.write_layer(entries, folder / name)


def layout(folder: Path, *, names: tuple[str, ...] = ("reg/img:a", "reg/img:b")) -> oci.Image:
    made = layer(folder, ENTRIES)
    oci.create(folder / "layout")
    oci.add_layer(folder / "layout", made, folder / "layer")
    return oci.add_image(
        folder / "layout", [made], arch=Arch.AMD64, names=names, config={"Labels": {"a": "b"}}, history=["one"]
    )


def test_the_same_entries_give_the_same_bytes(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(ENTRIES, len(ENTRIES))
    first, again, other = (
        layer(tmp_path, entries, name) for entries, name in ((ENTRIES, "a"), (ENTRIES, "b"), (shuffled, "c"))
    )
    assert first == again == other
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    assert first.descriptor.digest == f"sha256:{hashlib.sha256((tmp_path / 'a').read_bytes()).hexdigest()}"


def test_content_comes_from_bytes_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    (tmp_path / "source").chmod(0o600)
    from_file = layer(tmp_path, [Entry("x", "file", 0o644, tmp_path / "source")], "a")
    assert from_file == layer(tmp_path, [Entry("x", "file", 0o644, b"content")], "b")


def test_a_layer_holds_what_was_put_in(tmp_path: Path) -> None:
    image = layout(tmp_path)
    with (
        oci.open_layer(image.layout, image.layers[0].descriptor) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        members = {member.name: member for member in archive}
    assert set(members) == {
        *(entry.path for entry in ENTRIES),
        *("usr", "usr/bin", "usr/lib", "etc", "naïve"),
    }
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, oci.EPOCH)}
    assert members["usr/bin/tool"].mode == 0o755
    assert members["usr/lib/libx.so.1"].linkname == "libx.so.1.2"
    assert members["etc/empty"].mode == 0o700
    assert list(members) == sorted(members)


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="two entries of one name"):
        layer(tmp_path, [ENTRIES[0], ENTRIES[0]])


def test_the_diff_id_is_that_of_the_uncompressed_tar(tmp_path: Path) -> None:
    image = layout(tmp_path)
    with oci.open_layer(image.layout, image.layers[0].descriptor) as stream:
        assert f"sha256:{hashlib.sha256(stream.read()).hexdigest()}" == image.layers[0].diff_id


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_layers_of_others_are_read_too(compress: object, tmp_path: Path) -> None:
    assert callable(compress)
    oci.create(tmp_path)
    blob = oci.add_bytes(tmp_path, compress(b"a tar" * 1000), oci.LAYER_GZIP)
    with oci.open_layer(tmp_path, blob) as stream:
        assert stream.read() == b"a tar" * 1000


def test_an_image_is_found_by_name_digest_and_architecture(tmp_path: Path) -> None:
    image = layout(tmp_path)
    assert oci.find_image(image.layout, "reg/img:a", Arch.AMD64).digest == image.digest
    assert oci.find_image(image.layout).digest == image.digest
    assert sorted(oci.names_of(image.layout, image.digest)) == ["reg/img:a", "reg/img:b"]
    assert image.config["architecture"] == "amd64"
    assert image.config["created"] == oci.CREATED
    with pytest.raises(ConfigurationError, match=r"exactly one image reg/img:c.*got 0"):
        oci.find_image(image.layout, "reg/img:c")
    with pytest.raises(ConfigurationError, match="exactly one"):
        oci.find_image(image.layout, arch=Arch.ARM64)
    with pytest.raises(ConfigurationError, match="not an OCI image layout"):
        oci.find_image(tmp_path / "nowhere")


def test_the_same_image_has_the_same_digest_anywhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = layout(tmp_path / "a"), layout(tmp_path / "b", names=("other:name",))
    assert first.digest == second.digest


def test_a_name_moves(tmp_path: Path) -> None:
    image = layout(tmp_path)
    other = oci.add_image(image.layout, image.layers, arch=Arch.AMD64, names=["reg/img:a"], config={"Cmd": ["x"]})
    assert oci.find_image(image.layout, "reg/img:a").digest == other.digest
    assert oci.names_of(image.layout, image.digest) == ("reg/img:b",)


def blobs(image: oci.Image) -> dict[str, str]:
    return {
        "manifest": image.digest,
        "config": image.config_descriptor.digest,
        "layer": image.layers[0].descriptor.digest,
    }


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
@pytest.mark.parametrize("harm", ["missing", "flipped", "cut"])
def test_a_damaged_blob_is_named(which: str, harm: str, tmp_path: Path) -> None:
    image = layout(tmp_path)
    oci.check_blobs(image)
    digest = blobs(image)[which]
    path = oci.blob_path(image.layout, digest)
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BuildError, match=digest):
        oci.check_blobs(image)


def test_a_damaged_manifest_is_not_read(tmp_path: Path) -> None:
    image = layout(tmp_path)
    path = oci.blob_path(image.layout, image.digest)
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document, indent=1))
    with pytest.raises(BuildError, match="other bytes"):
        oci.find_image(image.layout)


def test_copying_a_layer_proves_it(tmp_path: Path) -> None:
    made = layer(tmp_path, ENTRIES)
    (tmp_path / "layer").write_bytes((tmp_path / "layer").read_bytes()[:-1])
    oci.create(tmp_path / "layout")
    with pytest.raises(BuildError, match="not those of its digest"):
        oci.add_layer(tmp_path / "layout", made, tmp_path / "layer")
    assert not list((tmp_path / "layout" / "blobs" / "sha256").iterdir())


@pytest.mark.parametrize(
    ("manifest", "config"),
    [
        (b"<html>", None),
        (b"{}", None),
        (b"[]", None),
        (None, b"{}"),
        (None, b"[1]"),
        (None, b'{"architecture": "amd64", "rootfs": {"diff_ids": []}}'),
    ],
)
def test_what_is_no_image_is_refused_in_words(manifest: bytes | None, config: bytes | None, tmp_path: Path) -> None:
    image = layout(tmp_path)
    document = dict(image.manifest)
    if config is not None:
        document["config"] = oci.add_bytes(image.layout, config, oci.CONFIG).to_json()
    data = manifest if manifest is not None else json.dumps(document).encode()
    descriptor = oci.add_bytes(image.layout, data, oci.MANIFEST)
    with pytest.raises(BuildError, match=r"is not an image's|is no plain JSON"):
        oci.read_image(image.layout, descriptor)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifests": [{}]}'])
def test_an_index_that_is_none_is_refused_in_words(text: str, tmp_path: Path) -> None:
    image = layout(tmp_path)
    (image.layout / "index.json").write_text(text)
    with pytest.raises(BuildError, match="an index that cannot be read"):
        oci.find_image(image.layout)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 1}}',
        b'{"a": NaN}',
        b"[" * 200_000 + b"]" * 200_000,
        b"{} {}",
    ],
    ids=["mark", "utf-16", "twice", "twice below", "nan", "deep", "two"],
)
def test_json_that_others_would_read_differently_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        oci.parse_json(data)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:../../etc/passwd"},
        {"digest": "sha512:" + "a" * 128},
        {"digest": "sha256:" + "A" * 64},
        {"digest": 1},
        {"size": -1},
        {"size": 1.0},
        {"size": True},
        {"mediaType": ["x"]},
        {"annotations": {oci.REF_NAME: 5}},
        {"annotations": "x"},
        {"platform": {"architecture": ["amd64"]}},
    ],
    ids=str,
)
def test_what_is_no_descriptor_is_refused(change: dict[str, object]) -> None:
    good = {"mediaType": oci.MANIFEST, "digest": "sha256:" + "a" * 64, "size": 1}
    assert oci.Descriptor.from_json(good).size == 1
    with pytest.raises((TypeError, ValueError)):
        oci.Descriptor.from_json({**good, **change})


def test_an_attestation_is_no_image(tmp_path: Path) -> None:
    image = layout(tmp_path)
    index = json.loads((image.layout / "index.json").read_text())
    other = {**index["manifests"][0], "digest": "sha256:" + "a" * 64}
    index["manifests"].append({**other, "platform": {"os": "unknown", "architecture": "unknown"}})
    (image.layout / "index.json").write_text(json.dumps(index))
    assert oci.find_image(image.layout).digest == image.digest


@pytest.mark.parametrize(
    "data", [None, b"\x28\xb5\x2f\xfd" + b"\xff" * 40, b"\x1f\x8b" + b"\xff" * 40, b"\x1f\x8b\x08"]
)
def test_a_layer_that_is_missing_or_garbage_is_damage(data: bytes | None, tmp_path: Path) -> None:
    image = layout(tmp_path)
    blob = oci.blob_path(image.layout, image.layers[0].descriptor.digest)
    blob.unlink()
    if data is not None:
        blob.write_bytes(data)
    with (
        pytest.raises(BuildError, match="damaged or missing"),
        oci.open_layer(image.layout, image.layers[0].descriptor) as stream,
    ):
        while stream.read(1 << 20):
            pass
