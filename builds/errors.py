"""What can go wrong, told apart by whose move it is.

Every error that reaches a user is a :class:`HarnessError`: subject, fact, what was found, a hint, and the
command that repeats the step. Its class fixes the exit status of ``python -m builds``.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Kind(enum.IntEnum):
    """The four kinds of error; the value is the exit status."""

    CONFIGURATION = 2
    BUILD = 3
    VERIFICATION = 4
    INFRASTRUCTURE = 5


INTERRUPTED = 130
"""Exit status of a run that was interrupted, as a shell reports SIGINT."""


class HarnessError(Exception):
    """An error a user can act on: what it is about, what is wrong, what was found, what to do."""

    kind: ClassVar[Kind]

    def __init__(
        self,
        subject: str,
        fact: str,
        *,
        got: str | None = None,
        hint: str | None = None,
        repeat: str | None = None,
    ) -> None:
        super().__init__(subject, fact)
        self.subject = subject
        self.fact = fact
        self.got = got
        self.hint = hint
        self.repeat = repeat

    def __str__(self) -> str:
        lines = [f"{self.subject}: {self.fact}" + (f", got {self.got}" if self.got else "")]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        if self.repeat:
            lines.append(f"repeat: {self.repeat}")
        return "\n".join(lines)


class ConfigurationError(HarnessError):
    """What was asked for cannot be: an unknown or excluded cell, a bad matrix file, a bad setting."""

    kind = Kind.CONFIGURATION


class ExcludedError(ConfigurationError):
    """A cell of which rules of the matrix leave nothing to build: wrong to ask for, but no failure among others."""


class BuildError(HarnessError):
    """A build cannot give its output: the compiler failed, a package is damaged, a checksum differs."""

    kind = Kind.BUILD


class VerificationError(HarnessError):
    """An image is not what it must be, or nobody has proven that it is."""

    kind = Kind.VERIFICATION


class InfrastructureError(HarnessError):
    """The surroundings failed: no engine, a registry out of reach, a full disk."""

    kind = Kind.INFRASTRUCTURE
