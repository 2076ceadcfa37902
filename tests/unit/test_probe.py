"""The header probe's decisions; what it finds is for the tests that compile."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from builds import probe
from builds.console import Reporter
from builds.errors import BuildError
from builds.model import ModuleType
from builds.plan import Plan

from .test_plan import make, rule

CHANGE = replace(probe.known()[0], driver="==570.*", types=(ModuleType.OPEN,))


def check(plan: Plan, *found: probe.Break) -> str:
    """What is said where nothing is refused."""
    said = io.StringIO()
    probe.check(plan, plan.sets[0], found, Reporter(Console(file=said, width=1000)))
    return said.getvalue()


def test_what_is_known_has_a_reason_and_names_that_make_can_build() -> None:
    names = [one.name for one in probe.known()]
    assert "pci_resize_resource" in names
    assert len(set(names)) == len(names)
    for one in probe.known():
        assert one.types
        assert "error: " in one.reason
        assert one.name.isidentifier()
        assert not one.name.startswith("_"), "the kernel's Makefile keeps such targets to itself"


@pytest.mark.parametrize(
    ("driver", "module_type", "hit"),
    [
        ("570.172.08", ModuleType.OPEN, True),
        ("570.172.08", ModuleType.PROPRIETARY, False),
        ("580.178.04", ModuleType.OPEN, False),
    ],
)
def test_a_change_hits_the_drivers_and_types_that_it_names(driver: str, module_type: ModuleType, hit: bool) -> None:
    assert CHANGE.hits(driver, module_type) == hit


def test_a_type_that_cannot_be_compiled_is_refused_before_it_is_tried() -> None:
    with pytest.raises(BuildError, match="has a change that this driver cannot take") as caught:
        check(make(), CHANGE)
    assert "pci_resize_resource" in str(caught.value)
    assert "6.12.44-3gl0" in str(caught.value)


def test_a_kernel_without_the_change_and_a_type_that_a_rule_leaves_out_are_not() -> None:
    assert check(make()) == ""
    assert check(make(rules=(rule(ModuleType.OPEN),)), CHANGE) == ""


def test_a_rule_whose_reason_the_kernel_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "known", lambda: (CHANGE,))
    wide = replace(rule(ModuleType.OPEN), reason="pci_resize_resource() takes one more argument")
    assert "the rule may be wider than its reason" in check(make(rules=(wide,)))
    assert check(make(rules=(wide,)), CHANGE) == ""
