"""The walk over many cells: which words of a compiler prove a rule."""

from __future__ import annotations

import pytest

from builds import lab_matrix, matrix

REASONS = {rule.reason for of in matrix.load_all() if of.inputs == "lab" for rule in of.rules}
RESIZE = "error: too few arguments to function 'pci_resize_resource'"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (f"/src/nvidia/nv-pci.c:237:9: {RESIZE}", "pci_resize_resource"),
        ("error: ‘struct vm_area_struct’ has no member named ‘__vm_flags’; did you mean ‘vm_fl’?", "__vm_"),
        ("nv-time.h:1: error: implicit declaration of function 'in_irq' [-Werror]", "in_irq"),
        ("no kernel-open/Makefile", "kernel-open"),
    ],
)
def test_the_reason_that_names_what_the_compiler_names_is_proven_and_no_other(said: str, named: str) -> None:
    assert {reason for reason in REASONS if lab_matrix._agree(reason, said)} == {
        reason for reason in REASONS if named in reason
    }


@pytest.mark.parametrize(
    "said",
    ["Killed", "an empty log", "gcc: fatal error: no space left on device", "error: 'resize' undeclared", "no modules"],
)
def test_what_names_nothing_of_the_reason_proves_nothing(said: str) -> None:
    assert not any(lab_matrix._agree(reason, said) for reason in REASONS)
