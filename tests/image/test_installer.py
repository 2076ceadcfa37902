"""The installer in the image: this project's own files, byte for byte, with the facts of this image."""

from __future__ import annotations

import hashlib

import pytest

from builds import paths

from .conftest import Compare
from .evidence import Expected, Found, InstallerPart, kind_of


@pytest.mark.check("installer.files")
def test_files(part: InstallerPart, found: Found, compare: Compare) -> None:
    node = found.rootfs.nodes.get(part.dest)
    compare(kind_of(node), "a file")
    assert node
    compare(oct(node.mode & 0o7777), oct(part.mode))


@pytest.mark.check("installer.bytes")
def test_bytes(part: InstallerPart, found: Found, compare: Compare) -> None:
    """A half-written part, or another version's, would be found out on the node."""
    data = found.file(part.dest).read()
    compare(hashlib.sha256(data).hexdigest(), hashlib.sha256(part.data).hexdigest(), "sha256: not this project's file")


@pytest.mark.check("installer.facts")
def test_facts(found: Found, expected: Expected, compare: Compare) -> None:
    """What the installer takes for its driver version and library folder is the plan's."""
    lines = found.file(f"{paths.INSTALLER}/release.env").read().decode(errors="replace").splitlines()
    plan = expected.plan
    compare(sorted(lines), [f"DRIVER_VERSION={plan.cell.driver}", f"TRIPLET={plan.cell.arch.triplet}"])


@pytest.mark.check("installer.unexpected")
def test_unexpected(found: Found, expected: Expected, compare: Compare) -> None:
    """The entry point sources nothing that is not there on purpose."""
    wanted = {part.dest for part in expected.installer}
    compare([node.path for node in found.rootfs.below(paths.INSTALLER) if node.path not in wanted], [])
