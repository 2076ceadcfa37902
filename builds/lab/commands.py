"""The host's commands that the lab needs: found, run, and their failures told to a user."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import InfrastructureError

_TAIL = 15  # lines of a failed command's output that a user is shown


def require(names: Iterable[str]) -> None:
    """Raise InfrastructureError naming the commands that the host lacks."""
    if lacking := [name for name in names if shutil.which(name) is None]:
        raise InfrastructureError(
            "lab",
            "needs commands that this machine lacks",
            got=", ".join(lacking),
            hint="`nox -s setup` installs it (the lab needs Debian, or a relative with apt and mmdebstrap)",
        )


def environment(**more: str) -> Mapping[str, str]:
    """The environment of a command whose output is read: in English, asking nobody."""
    return {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **more}


def output(command: Sequence[str], *, subject: str, hint: str | None = None, cwd: Path | None = None) -> str:
    """Standard output of a command. Raises InfrastructureError with the end of what it said if it fails."""
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "TERM", "--", *command],
        env=environment(),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise InfrastructureError(
            subject, f"{command[0]} failed with status {done.returncode}", got=tail(done.stderr), hint=hint
        )
    return done.stdout


def tail(text: str) -> str:
    """The last lines of a command's output, on one line if it is just one."""
    lines = [line for line in text.splitlines() if line.strip()][-_TAIL:]
    return lines[0] if len(lines) == 1 else "\n" + "\n".join(f"  {line}" for line in lines)
