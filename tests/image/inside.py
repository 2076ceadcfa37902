"""A container of the image: commands run in it by testinfra, each with proof that it still stands."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import testinfra
from docker.models.containers import Container

from builds import engine as engines
from builds.errors import InfrastructureError
from builds.verify import Subject

_PATIENCE = 30  # seconds that a command may take

_SETTLE = 0.5  # seconds within which the engine notices that a container has ended

ENDED = (124, 125, 126, 127, 137)
"""Statuses of a command that never started, or did not end in time."""


@dataclass(frozen=True)
class Said:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both outputs."""
        return self.out + self.err


@dataclass(frozen=True)
class Inside:
    """A running container of the image."""

    container: Container
    host: Any

    def run(self, *command: str, env: dict[str, str] | None = None) -> Said:
        """Run a command, ended after a while. Raises InfrastructureError where the container is not there any more."""
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        words = ["timeout", "-k", "1", str(_PATIENCE), "env", *variables, *command]
        result = self.host.run(shlex.join(words))
        if result.rc in ENDED:
            time.sleep(_SETTLE)
        self.container.reload()
        if self.container.status != "running":
            raise InfrastructureError("container", "is gone", got=self.container.status)
        return Said(result.rc, result.stdout, result.stderr)


@contextmanager
def open_inside(subject: Subject) -> Iterator[Inside]:
    """A container of the image, without network or privileges. Raises InfrastructureError where there can be none."""
    if subject.loaded is None:
        raise InfrastructureError("container", "none can be made", got=subject.missing)
    engine = engines.connect()
    engines.execution(engine, subject.plan.cell.arch)
    tool = next((name for name in ("docker", "podman") if shutil.which(name)), None)
    if tool is None:
        raise InfrastructureError("container", "needs the engine's command-line tool", got="neither docker nor podman")
    with engines.container(engine, subject.loaded, ["infinity"], entrypoint=["sleep"]) as made:
        made.start()
        inside = Inside(made, testinfra.get_host(f"{tool}://{made.id}"))
        said = inside.run("echo", "ready")
        if (said.status, said.out) != (0, "ready\n"):
            raise InfrastructureError("container", "runs no command", got=said.text.strip()[:200])
        yield inside
