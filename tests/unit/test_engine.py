"""Whose left-over containers are whose, and what an engine can run. No engine is asked."""

from __future__ import annotations

import os
from typing import Any

import pytest

from builds.engine import Engine, Execution, _is_gone, _owner, execution
from builds.errors import InfrastructureError
from builds.model import Arch

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


class _Refusing:
    """A client of an engine that runs nothing."""

    def __getattr__(self, name: str) -> Any:
        raise InfrastructureError("engine", "was asked", got=name)


@pytest.mark.parametrize("said", ["amd64", "x86_64"])
def test_an_engine_is_not_asked_to_run_what_is_its_own(said: str) -> None:
    engine: Any = Engine(_Refusing(), "unix:///x", "1", said)  # type: ignore[arg-type]
    assert execution(engine, Arch.AMD64) is Execution.NATIVE


def test_an_engine_that_does_not_run_an_architecture_is_told_with_what_helps() -> None:
    class Broken:
        api = images = containers = None

        def __init__(self) -> None:
            self.api = self.images = self

        def load_image(self, _: object) -> list[object]:
            raise InfrastructureError("probe", "exec format error")

        def remove(self, *_: object, **__: object) -> None:
            return

    engine = Engine(Broken(), "unix:///x", "1", "x86_64")  # type: ignore[arg-type]
    with pytest.raises(InfrastructureError, match="runs no programs for arm64") as caught:
        execution(engine, Arch.ARM64)
    assert "nox -s setup -- --arch arm64" in str(caught.value)
