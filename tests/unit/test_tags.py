"""Tags: literally what the operator computes, and what people read."""

from __future__ import annotations

import pytest

from builds import tags
from builds.errors import ConfigurationError
from builds.model import Cell
from builds.tags import TagKind

CELL = Cell.parse("570.172.08-1877.3-amd64-cloud")
KERNEL = "6.12.44-cloud-amd64"
KEY = "0123456789abcdef"


def compute(kernel: str = KERNEL, *, owns: bool = True, os_tag: str = "gardenlinux0") -> dict[TagKind, str]:
    found = tags.compute(CELL, kernel, os_tag=os_tag, aliases=["gardenlinux1877.3"], owns_branch=owns, key=KEY)
    return {tag.kind: tag.name for tag in found}


def test_the_four_tags_of_the_documented_cell() -> None:
    assert compute() == {
        TagKind.BRANCH: "570-6.12.44-cloud-amd64-gardenlinux0",
        TagKind.VERSION: "570.172.08-6.12.44-cloud-amd64-gardenlinux0",
        TagKind.ALIAS: "570-6.12.44-cloud-amd64-gardenlinux1877.3",
        TagKind.IMMUTABLE: "570.172.08-6.12.44-cloud-amd64-0123456789ab",
    }


def test_an_older_driver_does_not_take_the_branch() -> None:
    assert set(compute(owns=False)) == {TagKind.VERSION, TagKind.IMMUTABLE}


def test_only_the_immutable_tag_does_not_move() -> None:
    assert [kind for kind in TagKind if not tags.Tag(kind, "x").moves] == [TagKind.IMMUTABLE]


def test_two_tags_of_one_spelling_are_one() -> None:
    names = compute(os_tag="gardenlinux1877.3")
    assert TagKind.ALIAS not in names
    assert names[TagKind.BRANCH] == "570-6.12.44-cloud-amd64-gardenlinux1877.3"


def test_a_kernel_with_a_plus_is_not_addressable_and_is_written_with_an_underscore() -> None:
    kernel = "6.12.117+deb13-cloud-amd64"
    assert not tags.addressable(CELL, kernel, "debian13")
    assert compute(kernel)[TagKind.BRANCH] == "570-6.12.117_deb13-cloud-amd64-gardenlinux0"


def test_a_kernel_without_is_addressable() -> None:
    assert tags.addressable(CELL, KERNEL, "gardenlinux0")


def test_a_tag_that_is_too_long_is_an_error() -> None:
    assert not tags.addressable(CELL, "6" * 120, "gardenlinux0")
    with pytest.raises(ConfigurationError, match="longer than 128"):
        compute("6" * 120)
