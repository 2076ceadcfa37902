"""The modules in the kernel that they are for: loaded, asked for their version, unloaded again.

A virtual machine boots the cell's own kernel and takes the modules out of the image, both types one after the other.
Modules that are wrong on purpose are tried in the same boot: a kernel that takes those would prove nothing.
"""

from __future__ import annotations

import re

import pytest

from builds.loading import LOADED, PEERMEM, REFUSALS, Answer
from builds.model import ModuleType

from .conftest import Compare
from .evidence import ControlRef, Expected, ModuleRef, TypeRef
from .guests import NO_ANSWER, Guests

_PROPRIETARY, _FORCED = 1 << 0, 1 << 1
"""Bits of /proc/sys/kernel/tainted (the kernel's Documentation/admin-guide/tainted-kernels.rst)."""

_NO_INFINIBAND = "ran, and ended for want of InfiniBand's peer memory"


@pytest.mark.check("load.modules", required=False)
def test_modules(module: ModuleRef, guests: Guests, compare: Compare) -> None:
    """The kernel takes the module, and the module starts its work.

    nvidia-peermem stays only where there is InfiniBand's peer memory: it may say so and end, but not be refused.
    """
    answer = guests.answer(module, f"load/{module.type}/{module.name}")
    found = _status(answer, "loaded")
    if module.name == PEERMEM and answer and answer.error == "EINVAL" and not _refusals(module, answer):
        found = _NO_INFINIBAND
    allowed = {"loaded"} | ({_NO_INFINIBAND} if module.name == PEERMEM else set())
    compare(found, found if found in allowed else "loaded", _words(answer))


@pytest.mark.check("load.version", required=False)
def test_version(loads: TypeRef, guests: Guests, expected: Expected, compare: Compare) -> None:
    """The driver that runs says that it is of the version and type that it was loaded for."""
    answer = guests.answer(loads, f"version/{loads.type}")
    text = " ".join(answer.text) if answer else ""
    version = re.search(r"\d+(?:\.\d+)+", text.partition("Kernel Module")[2])
    compare(
        {"type": "open" if "Open Kernel Module" in text else "proprietary", "version": version and version[0]},
        {"type": loads.type, "version": expected.plan.cell.driver},
        text[:200] or NO_ANSWER,
    )


@pytest.mark.check("load.taint", required=False)
def test_taint(loads: TypeRef, guests: Guests, compare: Compare) -> None:
    """No module had to be forced, and the kernel takes the licence for what it is."""
    answer = guests.answer(loads, f"taint/{loads.type}")
    flags = int(answer.text[0]) if answer and answer.text else -1
    compare(
        {"forced": bool(flags & _FORCED), "proprietary": bool(flags & _PROPRIETARY)},
        {"forced": False, "proprietary": loads.type is ModuleType.PROPRIETARY},
        f"tainted: {flags}",
    )


@pytest.mark.check("load.unload", required=False)
def test_unload(loads: TypeRef, guests: Guests, compare: Compare) -> None:
    """The modules go as they came: a node gets its next driver without a reboot."""
    answers = {name: guests.answer(loads, f"unload/{loads.type}/{name}") for name in LOADED}
    compare(
        {name: _status(answer, "unloaded") for name, answer in answers.items()},
        dict.fromkeys(LOADED, "unloaded"),
        "; ".join(filter(None, map(_words, answers.values()))),
    )


@pytest.mark.check("load.controls", required=False)
def test_controls(control: ControlRef, guests: Guests, compare: Compare) -> None:
    """The kernel refuses the image's own nvidia-uvm once it is made wrong, and says why."""
    error, words = REFUSALS[control.control]
    answer = guests.answer(control, f"control/{control.control.name}")
    said = _words(answer)
    compare(
        {"refused": answer.error if answer else NO_ANSWER, "kernel": said},
        {"refused": error, "kernel": said if re.search(words, said) else words},
    )


def _status(answer: Answer | None, success: str) -> str:
    return NO_ANSWER if answer is None else answer.error or success


def _refusals(module: ModuleRef, answer: Answer) -> list[str]:
    """What the kernel's own loader says against a module: it calls it by its name and a colon."""
    name = module.name.replace("-", "_")
    return [line for line in answer.kernel if line.startswith(f"{name}: ") and "taint" not in line]


def _words(answer: Answer | None) -> str:
    return "; ".join(answer.kernel) if answer else NO_ANSWER
