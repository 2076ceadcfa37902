"""Which record lets an image pass, and what labels of an image in a registry tell before its tags move."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builds import __version__, push, recipes, verify
from builds.errors import VerificationError
from builds.image import PREFIX
from builds.model import Cell
from builds.oci import Descriptor, Image
from builds.plan import InputImage, InputPackage, Plan
from builds.record import CheckResult, Outcome, Record

BUILD, PACKAGE = f"{PREFIX}.kernel-build", f"{PREFIX}.kernel-package"


@pytest.mark.parametrize(
    ("labels", "builds"),
    [
        ({BUILD: "d1", PACKAGE: "6.12.60-3gl0"}, {"d1": "6.12.60-3gl0"}),
        ({BUILD: "d1,d2", PACKAGE: "a,b"}, {"d1": "a", "d2": "b"}),
        ({BUILD: "d1,d2", PACKAGE: "a"}, {"d1": "d1", "d2": "d2"}),
        ({BUILD: 5}, {"5": ""}),
        ({}, {}),
        ([], {}),
        ("none", {}),
        (None, {}),
    ],
)
def test_kernel_builds_are_read_from_labels_of_any_kind(labels: object, builds: dict[str, str]) -> None:
    assert push._builds({"config": {"Labels": labels}}) == builds


@pytest.mark.parametrize("config", [{}, {"config": None}, {"config": []}, {"config": "x"}])
def test_an_image_without_labels_has_no_kernel_builds(config: dict[str, Any]) -> None:
    assert push._builds(config) == {}


DIGEST, KEY = "sha256:" + "a" * 64, "b" * 64
CELL = Cell.parse("550.163.01-debian12-amd64-cloud")
IMAGE = Image(Path("layout"), Descriptor("", DIGEST, 1), {}, {"config": {"Labels": {f"{PREFIX}.plan-key": KEY}}})
DRIVER = InputPackage("x.run", "c" * 64, 1)
PLAN = Plan(CELL, (), InputImage("x", DIGEST), DRIVER, "u", KEY, "reg/driver", "debian12", addressable=True, tags=())


def verified(**load: Outcome) -> Record:
    """A record of all checks there are, passed but for what is said of those that load modules."""
    outcomes = {name: load.get(name.removeprefix("load."), Outcome.PASSED) for name in sorted(verify.known_checks())}
    checks = tuple(
        CheckResult(name, "", outcome, 1, 1, f"why {outcome}", 0.1, required=not name.startswith("load."))
        for name, outcome in outcomes.items()
    )
    tools = {"harness": __version__, "checks": recipes.CHECKS}
    return Record(DIGEST, 1, (), CELL.id, json.loads(json.dumps(PLAN.to_json())), checks, tools, "nox -s verify")


@pytest.mark.parametrize("must_load", [False, True])
def test_an_image_whose_modules_were_loaded_is_admitted(must_load: bool) -> None:
    assert push.admit(verified(), IMAGE, "", must_load=must_load) == PLAN


@pytest.mark.parametrize("name", sorted(one for one in verify.known_checks() if one.startswith("load.")))
def test_an_image_whose_modules_were_not_loaded_is_admitted_only_where_nobody_demands_it(name: str) -> None:
    record = verified(**{name.removeprefix("load."): Outcome.NOT_RUN})
    assert push.admit(record, IMAGE, "") == PLAN
    with pytest.raises(VerificationError, match="nothing proves that its modules load, which LOAD_TEST") as caught:
        push.admit(record, IMAGE, "nox -s verify", must_load=True)
    assert caught.value.got == "why not run"
    assert caught.value.hint == "verify it: nox -s verify"


@pytest.mark.parametrize("must_load", [False, True])
def test_an_image_whose_modules_did_not_load_is_never_admitted(must_load: bool) -> None:
    with pytest.raises(VerificationError, match=r"did not pass.*load\.unload"):
        push.admit(verified(unload=Outcome.FAILED), IMAGE, "", must_load=must_load)


@pytest.mark.parametrize("must_load", [False, True])
def test_a_record_without_the_checks_that_load_modules_is_not_enough(must_load: bool) -> None:
    record = verified()
    record = replace(record, checks=tuple(check for check in record.checks if check.group != "load"))
    with pytest.raises(VerificationError, match=r"lacks checks|none was tried"):
        push.admit(record, IMAGE, "", must_load=must_load)
