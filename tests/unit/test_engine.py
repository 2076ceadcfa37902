"""Whose left-over containers are whose. No engine is asked."""

from __future__ import annotations

import os
from typing import Any

import pytest

from builds.engine import _is_gone, _owner

HERE = {**_owner(), "machine": "m1"}


@pytest.mark.parametrize(
    ("owner", "gone"),
    [
        ({}, False),
        ({"started": 1.0}, True),
        ({"pid": 2**22 + 1}, True),
        ({"pids": 1, "pid": 2**22 + 1}, False),
        ({"boot": "another", "pid": os.getpid()}, True),
        ({"boot": "another", "machine": "m2"}, False),
    ],
    ids=["alive", "pid taken over", "ended", "in another namespace", "before the last boot", "on another machine"],
)
def test_a_maker_is_gone_only_where_that_is_certain(owner: dict[str, Any], gone: bool) -> None:
    assert _is_gone({**HERE, **owner}, HERE) is gone


def test_a_machine_without_a_name_is_not_taken_for_another_without_one() -> None:
    here = {**HERE, "machine": ""}
    assert not _is_gone({**here, "boot": "another"}, here)
