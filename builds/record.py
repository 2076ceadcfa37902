"""The verification record: which image, which checks, what each expected and found, and the verdict.

It is what a push demands, what QA repeats a verdict from, and what a CI system shows (as JUnit XML). Its JSON form
is published as ``schema/record.json``.
"""

from __future__ import annotations

import enum
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema

from .cache import write_atomically
from .errors import VerificationError

SCHEMA = Path(__file__).parent / "schema" / "record.json"


class Outcome(enum.StrEnum):
    """What came of a check. Only the first is a pass."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class CheckResult:
    """One check of one object."""

    id: str
    """Group and name of the check: ``modules.vermagic``."""
    object: str
    """What was checked: ``open/nvidia.ko``; empty where there is but one."""
    outcome: Outcome
    expected: Any
    """As JSON; None where nothing was compared."""
    found: Any
    message: str
    """Why it failed or was not run; empty for a pass."""
    seconds: float

    @property
    def group(self) -> str:
        """What the check is about."""
        return self.id.partition(".")[0]

    @property
    def name(self) -> str:
        """Check and object, as reports call them: ``modules.vermagic[open/nvidia.ko]``."""
        return f"{self.id}[{self.object}]" if self.object else self.id


@dataclass(frozen=True)
class Record:
    """The outcome of a verification."""

    digest: str
    """Digest of the image's manifest."""
    size: int
    """Bytes of the image, as a registry stores it."""
    names: tuple[str, ...]
    cell: str
    """Id of the cell that the image was held against."""
    plan: Mapping[str, Any]
    checks: tuple[CheckResult, ...]
    tools: Mapping[str, str]
    """Version of whatever took part; ``checks`` is the digest of the checks themselves."""
    repeat: str
    """The command that repeats the verification."""

    @property
    def passed(self) -> bool:
        """Whether there are checks and every one passed: one that was not run proves nothing."""
        return bool(self.checks) and all(check.outcome is Outcome.PASSED for check in self.checks)

    def of(self, outcome: Outcome) -> tuple[CheckResult, ...]:
        """The checks that came out so."""
        return tuple(check for check in self.checks if check.outcome is outcome)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON document."""
        return {"schema": 1, "passed": self.passed, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Record:
        """Read a record out of a document. Raises VerificationError where it is none, or its verdict is another."""
        validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
        if problem := jsonschema.exceptions.best_match(validator.iter_errors(document)):
            place = ".".join(map(str, problem.absolute_path)) or "document"
            raise VerificationError("record", "is not a verification record", got=f"{place}: {problem.message}"[:300])
        record = cls(
            digest=document["digest"],
            size=document["size"],
            names=tuple(document["names"]),
            cell=document["cell"],
            plan=document["plan"],
            checks=tuple(
                CheckResult(**{**check, "outcome": Outcome(check["outcome"])}) for check in document["checks"]
            ),
            tools=document["tools"],
            repeat=document["repeat"],
        )
        if record.passed != document["passed"]:
            raise VerificationError(
                "record", "its verdict does not follow from its checks", got=str(document["passed"])
            )
        return record

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record from a file. Raises VerificationError where it is none."""
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise VerificationError(f"record {path}", "cannot be read", got=str(error)) from error
        return cls.from_json(document)

    def write(self, folder: Path) -> None:
        """Write ``record.json`` and ``junit.xml`` to a folder."""
        document = json.loads(json.dumps(self.to_json()))
        self.from_json(document)
        write_atomically(folder / "junit.xml", junit(self))
        write_atomically(folder / "record.json", json.dumps(document, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Count:
    """How the checks of a group came out."""

    group: str
    passed: int
    failed: int
    not_run: int
    seconds: float


def counts(checks: Iterable[CheckResult]) -> tuple[Count, ...]:
    """The checks of each group, counted, in the order in which the groups first appear."""
    groups: dict[str, list[CheckResult]] = {}
    for check in checks:
        groups.setdefault(check.group, []).append(check)

    def number(members: list[CheckResult], outcome: Outcome) -> int:
        return sum(check.outcome is outcome for check in members)

    return tuple(
        Count(
            group,
            number(members, Outcome.PASSED),
            number(members, Outcome.FAILED),
            number(members, Outcome.NOT_RUN),
            sum(check.seconds for check in members),
        )
        for group, members in groups.items()
    )


def junit(record: Record) -> bytes:
    """The record as JUnit XML: a suite per group, a test case per check and object.

    Made from the record and not by pytest, so that both say the same, also of a run that was cut short.
    """
    root = ET.Element("testsuites", name=f"{record.cell} {record.digest}")
    for count in counts(record.checks):
        members = [check for check in record.checks if check.group == count.group]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=count.group,
            tests=str(len(members)),
            failures=str(count.failed),
            errors=str(count.not_run),
            skipped="0",
            time=f"{count.seconds:.3f}",
        )
        for check in members:
            name = check.name.removeprefix(f"{check.group}.")
            case = ET.SubElement(suite, "testcase", classname=check.group, name=name, time=f"{check.seconds:.3f}")
            if check.outcome is not Outcome.PASSED:
                # To CI systems a skipped case looks like a pass; one that was not run must not.
                tag = "failure" if check.outcome is Outcome.FAILED else "error"
                verdict = ET.SubElement(case, tag, message=_clean(check.message or check.outcome), type=check.outcome)
                verdict.text = _clean(
                    f"expected: {json.dumps(check.expected)}\nfound: {json.dumps(check.found)}\nrepeat: {record.repeat}"
                )
    ET.indent(root)
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def _clean(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return "".join(character for character in text if character in "\t\n" or ord(character) >= 32)
