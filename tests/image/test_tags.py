"""The names of the image, held against the GPU Operator's rule as this file states it, on its own.

Nothing of ``builds.tags`` is used here: a mistake there must show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from builds.plan import Plan

from .conftest import Compare
from .evidence import Expected

_KINDS = ("branch", "version", "alias", "immutable")


@pytest.mark.check("tags.expected")
@pytest.mark.parametrize("kind", _KINDS)
def test_expected(kind: str, expected: Expected, compare: Compare) -> None:
    """The image has each tag that is its due. Where it was named by somebody, the names given are judged below."""
    subject = expected.subject
    due = {f"{expected.plan.image_path}:{tag}" for tag in _oracle(expected.plan).get(kind, ())}
    compare(set(subject.names) & due if subject.complete else [], due if subject.complete else [])


@pytest.mark.check("tags.plan")
@pytest.mark.parametrize("kind", _KINDS)
def test_plan(kind: str, expected: Expected, compare: Compare) -> None:
    """A push sets the tags of the plan: they are its due, and no others. Where two are spelled alike one stands."""
    wanted, planned = _oracle(expected.plan), expected.plan.tags
    compare(sorted(tag.name for tag in planned), sorted(_all(wanted)))
    compare({tag.name for tag in planned if tag.kind == kind} - set(wanted.get(kind, ())), [])


@pytest.mark.check("tags.unexpected")
def test_unexpected(expected: Expected, compare: Compare) -> None:
    """Every name it has ends in a tag of this cell, spelled out."""
    subject, wanted = expected.subject, _all(_oracle(expected.plan))
    tags = {_tag(name) for name in subject.names}
    # Somebody may name an image by its digest alone; a layout that names a repository must say the tag.
    compare(sorted(str(tag) for tag in tags - wanted if tag or subject.complete), [])
    compare(bool(tags) or not subject.complete, True, "it has no name")


@pytest.mark.check("tags.repository")
def test_repository(expected: Expected, compare: Compare) -> None:
    """Names that the layout itself carries are of the plan's repository."""
    subject = expected.subject
    foreign = [name for name in subject.names if "/" in name and not name.startswith(f"{expected.plan.image_path}:")]
    compare(foreign if subject.complete else [], [])


@pytest.mark.check("tags.legal")
def test_legal(expected: Expected, compare: Compare) -> None:
    """What a registry takes: at most 128 characters, none but letters, digits, `_`, `.` and `-`."""
    tags = [tag for name in expected.subject.names if (tag := _tag(name)) is not None]
    compare([tag for tag in tags if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", tag)], [])


@pytest.mark.check("tags.addressable")
def test_addressable(expected: Expected, compare: Compare) -> None:
    """The operator can address the image; a lab cell may be one that it cannot, and then the plan says so."""
    plan = expected.plan
    composed = [_operator(version, plan) for version in (plan.cell.driver, plan.cell.driver.split(".")[0])]
    can = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", tag) for tag in composed)
    compare(
        {"addressable": plan.addressable, "or a lab cell": can or _is_lab(plan)},
        {"addressable": can, "or a lab cell": True},
    )


def _tag(name: str) -> str | None:
    """The tag in a name; of one without a repository all of it, of one without a tag none."""
    last = name.rpartition("/")[2]
    return last.rpartition(":")[2] if ":" in last or "/" not in name else None


def _is_lab(plan: Plan) -> bool:
    """Lab cells are called after a Debian release; those of Garden Linux after its version."""
    return plan.cell.gl.startswith("debian")


def _operator(version: str, plan: Plan) -> str:
    """``<driver.version>-<uname -r>-<ID><VERSION_ID>``, verbatim (operator contract, rows 1 to 3).

    With our Helm values a Garden Linux node has ``VERSION_ID=0``; a Debian node has ``ID=debian`` and its number, also
    where its kernel is a backport.
    """
    debian = re.match(r"debian\d+", plan.cell.gl)
    system = debian[0] if debian else "gardenlinux0"
    return f"{version}-{_kernel(plan)}-{system}"


def _kernel(plan: Plan) -> str:
    """``uname -r`` on the node, the same for every build that the image has modules for."""
    (release,) = {one.kernel.build.release for one in plan.sets}
    return release


def _all(tags: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {tag for kind in tags.values() for tag in kind}


def _oracle(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The tags that are the image's due, by kind; only the newest driver of a branch has ``branch`` and ``alias``.

    There is an alias for each release whose nodes find their modules in the image.
    """
    major = plan.cell.driver.split(".")[0]
    releases = sorted({gl for one in plan.sets for gl in one.releases})
    tags = {
        "version": [_operator(plan.cell.driver, plan)],
        "immutable": [f"{plan.cell.driver}-{_kernel(plan)}-{plan.image[:12]}"],
    }
    if any(tag.kind == "branch" for tag in plan.tags):
        prefix = "" if _is_lab(plan) else "gardenlinux"
        tags["branch"] = [_operator(major, plan)]
        tags["alias"] = [f"{major}-{_kernel(plan)}-{prefix}{gl}" for gl in releases]
    # What no registry takes is written `_`, so that people can still name the image; the operator cannot.
    return {kind: tuple(re.sub(r"[^A-Za-z0-9._-]", "_", tag) for tag in found) for kind, found in tags.items()}
