"""The tags of an image, as the GPU Operator computes them and as people read them.

The operator composes ``<driver.version>-<uname -r>-<ID><VERSION_ID>`` verbatim, without escaping; a tag is at
most 128 characters of ``[A-Za-z0-9_.-]`` (OCI distribution specification).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import ConfigurationError
from .model import Cell

_LEGAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class TagKind(enum.StrEnum):
    """What a tag is for; all but ``immutable`` move."""

    BRANCH = "branch"
    """The newest verified image of a driver branch: what the operator computes for ``driver.version: "570"``."""
    VERSION = "version"
    """One driver version."""
    ALIAS = "alias"
    """The branch, with the Garden Linux release spelled out."""
    IMMUTABLE = "immutable"
    """One plan; never overwritten."""


@dataclass(frozen=True)
class Tag:
    """One tag of an image."""

    kind: TagKind
    name: str

    @property
    def moves(self) -> bool:
        """Whether a later image may take the tag over."""
        return self.kind is not TagKind.IMMUTABLE


def addressable(cell: Cell, kernel: str, os_tag: str) -> bool:
    """Whether the operator can address an image for this kernel at all: what it composes is a legal tag."""
    return all(_LEGAL.fullmatch(f"{version}-{kernel}-{os_tag}") for version in (cell.driver, cell.driver_major))


def compute(
    cell: Cell, kernel: str, *, os_tag: str, aliases: Iterable[str], owns_branch: bool, key: str
) -> tuple[Tag, ...]:
    """All tags of a cell's image, most general first; where two are spelled alike the first stands for both.

    ``kernel`` is the release name, ``aliases`` has one for each release that the image is for, ``key`` is the
    image's. Characters that are illegal in a tag are written
    ``_``: the operator will not find such a tag, but people can still name the image.
    """
    named = [
        (TagKind.BRANCH, f"{cell.driver_major}-{kernel}-{os_tag}"),
        (TagKind.VERSION, f"{cell.driver}-{kernel}-{os_tag}"),
        *((TagKind.ALIAS, f"{cell.driver_major}-{kernel}-{alias}") for alias in aliases),
        (TagKind.IMMUTABLE, f"{cell.driver}-{kernel}-{key[:12]}"),
    ]
    if not owns_branch:
        named = [(kind, name) for kind, name in named if kind not in (TagKind.BRANCH, TagKind.ALIAS)]
    tags: dict[str, Tag] = {}
    for kind, name in named:
        legal = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        if not _LEGAL.fullmatch(legal):
            raise ConfigurationError(f"tag {legal}", "is longer than 128 characters", got=str(len(legal)))
        tags.setdefault(legal, Tag(kind, legal))
    return tuple(tags.values())
