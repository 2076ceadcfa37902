"""References to inputs, and where they lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from builds import oci, sources
from builds.cache import Cache
from builds.console import Reporter
from builds.errors import BuildError, ConfigurationError
from builds.model import Arch
from builds.registry import Reference

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ghcr.io/a/b:1.2", Reference("ghcr.io", "a/b", "1.2", None)),
        (f"ghcr.io/a/b@{DIGEST}", Reference("ghcr.io", "a/b", None, DIGEST)),
        (f"127.0.0.1:5000/a:t@{DIGEST}", Reference("127.0.0.1:5000", "a", "t", DIGEST)),
    ],
)
def test_a_reference_reads_and_prints_alike(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "image", "ghcr.io/a/b", "ghcr.io/A/b:1", "ghcr.io/a/b:", "ghcr.io/a/b@sha256:12"])
def test_what_is_no_complete_reference_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a complete reference"):
        Reference.parse(text)


def test_folder_and_name_of_a_layout_may_have_colons(tmp_path: Path) -> None:
    layout = tmp_path / "with:colon"
    oci.create(layout)
    assert sources.split_layout(f"{layout}") == (layout, None)
    assert sources.split_layout(f"{layout}:127.0.0.1:5000/a:tag") == (layout, "127.0.0.1:5000/a:tag")


def test_a_layout_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not an OCI image layout"):
        sources.image(f"oci:{tmp_path / 'none'}:tag", Arch.AMD64, Cache(tmp_path), Reporter())


def test_a_layout_without_the_image_says_what_it_has(tmp_path: Path) -> None:
    oci.create(tmp_path)
    oci.add_image(tmp_path, [], arch=Arch.AMD64, names=["here"])
    with pytest.raises(ConfigurationError, match="it names here"):
        sources.image(f"oci:{tmp_path}:there", Arch.AMD64, Cache(tmp_path), Reporter())
    with pytest.raises(ConfigurationError, match="here for arm64"):
        sources.image(f"oci:{tmp_path}:here", Arch.ARM64, Cache(tmp_path), Reporter())


@pytest.mark.parametrize(
    ("there", "wanted", "taken"),
    [
        ([Arch.ARM64], Arch.ARM64, Arch.ARM64),
        ([Arch.AMD64], Arch.ARM64, Arch.AMD64),
        ([Arch.AMD64, Arch.ARM64], Arch.ARM64, Arch.ARM64),
        ([Arch.AMD64, Arch.ARM64], Arch.AMD64, Arch.AMD64),
        ([Arch.ARM64], Arch.AMD64, Arch.ARM64),
    ],
)
def test_a_kmodbuild_image_is_the_cells_or_else_the_only_one(
    there: list[Arch], wanted: Arch, taken: Arch, tmp_path: Path
) -> None:
    oci.create(tmp_path)
    for arch in there:
        oci.add_image(tmp_path, [], arch=arch, names=["here"], history=[f"for {arch}"])
    found = sources.kmodbuild(f"oci:{tmp_path}:here", wanted, Cache(tmp_path), Reporter())
    assert found.config["architecture"] == taken


def test_of_two_kmodbuild_images_for_other_architectures_none_is_taken(tmp_path: Path) -> None:
    oci.create(tmp_path)
    with pytest.raises(ConfigurationError, match="exactly one image"):
        sources.kmodbuild(f"oci:{tmp_path}:here", Arch.ARM64, Cache(tmp_path), Reporter())
    images = {"sha256:1": "amd64", "sha256:2": "riscv64"}
    assert oci.of_architecture(images, Arch.ARM64, others=True) == ("sha256:1", "sha256:2")
    assert oci.of_architecture(images, Arch.ARM64, others=False) == ()


def test_a_folder_without_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"NVIDIA-Linux-x86_64-1\.2\.run"):
        sources.driver_package(str(tmp_path), "1.2", Arch.AMD64, None, Cache(tmp_path), Reporter())


HEX = "0123456789abcdef" * 4
NAME = "NVIDIA-Linux-x86_64-1.2.run"


@pytest.mark.parametrize(
    "text",
    [
        HEX,
        f"{HEX}\n",
        f"{HEX.upper()}  {NAME}\n",
        f"{HEX} *{NAME}\r\n",
        f"{HEX}  ./1.2/{NAME}",
        f"SHA256 ({NAME}) = {HEX}",
        f"{'f' * 64}  other.run\n\n{HEX}  {NAME}\n{HEX}  {NAME}\n",
    ],
)
def test_a_published_checksum_is_read_in_every_usual_form(text: str) -> None:
    assert sources.parse_sha256sum(text, NAME, "where") == HEX


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!DOCTYPE html>\n",
        f"{HEX}  other.run",
        f"{HEX[:-1]}  {NAME}",
        f"{HEX}{NAME}",
        f"{HEX}  {NAME}\n{'f' * 64}  {NAME}",
        f"{HEX}  {NAME}\n<html>",
        f"MD5 ({NAME}) = {HEX}",
    ],
)
def test_what_is_no_checksum_of_the_package_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="where"):
        sources.parse_sha256sum(text, NAME, "where")
