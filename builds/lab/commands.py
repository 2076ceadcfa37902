"""The host's commands that the lab needs: found, run, and their failures told to a user."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import InfrastructureError

_FULL = "No space left on device"  # strerror(ENOSPC) in the language of environment()
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
        raise failure(subject, f"{command[0]} failed with status {done.returncode}", done.stderr, hint)
    return done.stdout


def failure(subject: str, fact: str, said: str, hint: str | None) -> InfrastructureError:
    """The error for a command that failed, with the end of what it said; a full disk is said in so many words."""
    if full := next((line.strip() for line in said.splitlines() if _FULL in line), None):
        space = "free some space, or name another place with CACHE_DIR"
        return InfrastructureError(
            subject, f"the disk is full: {fact}", got=full, hint="; ".join(filter(None, (space, hint)))
        )
    return InfrastructureError(subject, fact, got=tail(said), hint=hint)


def tail(text: str) -> str:
    """The last lines of a command's output, on one line if it is just one."""
    lines = [line for line in text.splitlines() if line.strip()][-_TAIL:]
    return lines[0] if len(lines) == 1 else "\n" + "\n".join(f"  {line}" for line in lines)
