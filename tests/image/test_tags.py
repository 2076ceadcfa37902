"""The names of the image, held against the GPU Operator's rule as this file states it, on its own.

Nothing of ``builds.tags`` is used here: a mistake there must show.
"""

from __future__ import annotations

import re

import pytest

from builds.plan import Plan

from .conftest import Compare
from .evidence import Expected

_KINDS = ("branch", "version", "alias", "immutable")


@pytest.mark.check("tags.expected")
@pytest.mark.parametrize("kind", _KINDS)
def test_expected(kind: str, expected: Expected, compare: Compare) -> None:
    """The image has each tag that is its due. Where it was named by somebody, the names given are judged below."""
    wanted, subject = _oracle(expected.plan), expected.subject
    names = set(subject.names) & {f"{expected.plan.image_path}:{wanted[kind]}"} if kind in wanted else set()
    due = kind in wanted and subject.complete
    compare(names if due else [], [f"{expected.plan.image_path}:{wanted[kind]}"] if due else [])


@pytest.mark.check("tags.plan")
@pytest.mark.parametrize("kind", _KINDS)
def test_plan(kind: str, expected: Expected, compare: Compare) -> None:
    """A push sets the tags of the plan: they are its due, and no others. Where two are spelled alike one stands."""
    wanted, planned = _oracle(expected.plan), {str(tag.kind): tag.name for tag in expected.plan.tags}
    compare(sorted(planned.values()), sorted(set(wanted.values())))
    compare(planned.get(kind, wanted.get(kind)), wanted.get(kind))


@pytest.mark.check("tags.unexpected")
def test_unexpected(expected: Expected, compare: Compare) -> None:
    """Every name it has ends in a tag of this cell, spelled out."""
    subject, wanted = expected.subject, set(_oracle(expected.plan).values())
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
    system = plan.cell.gl.partition(".")[0] if _is_lab(plan) else "gardenlinux0"
    return f"{version}-{plan.kernel.build.release}-{system}"


def _oracle(plan: Plan) -> dict[str, str]:
    """The tags that are the image's due, by kind; only the newest driver of a branch has ``branch`` and ``alias``."""
    major = plan.cell.driver.split(".")[0]
    release = plan.cell.gl if _is_lab(plan) else f"gardenlinux{plan.cell.gl}"
    tags = {
        "version": _operator(plan.cell.driver, plan),
        "immutable": f"{plan.cell.driver}-{plan.kernel.build.release}-{plan.image[:12]}",
    }
    if any(tag.kind == "branch" for tag in plan.tags):
        tags |= {"branch": _operator(major, plan), "alias": f"{major}-{plan.kernel.build.release}-{release}"}
    # What no registry takes is written `_`, so that people can still name the image; the operator cannot.
    return {kind: re.sub(r"[^A-Za-z0-9._-]", "_", tag) for kind, tag in tags.items()}
