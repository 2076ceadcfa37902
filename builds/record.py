"""The verification record: which image, which checks, what each expected and found, and the verdict.

It is what a push demands, what QA repeats a verdict from, and what a CI system shows (as JUnit XML). Its JSON form
is published as ``schema/record.json``.
"""

from __future__ import annotations

import enum
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
from packaging.version import InvalidVersion, Version

from .cache import write_atomically
from .errors import VerificationError

RECORD, JUNIT = "record.json", "junit.xml"
"""What a verification leaves."""

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
    required: bool = True
    """Whether the image is not passed without it; else it may be ``not run``, never failed."""

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
    reference: str | None = None
    """What ``--image`` named; None where the image was built from its plan."""

    @property
    def passed(self) -> bool:
        """Whether checks passed and none failed, nor any that is required was not run: that proves nothing."""
        return bool(self.of(Outcome.PASSED)) and not self.of(Outcome.FAILED) and not self.missing

    @property
    def made_by(self) -> Version:
        """Version of the project that made it."""
        return Version(self.tools["harness"])

    @property
    def summary(self) -> str:
        """How many checks passed, in words."""
        return f"{len(self.of(Outcome.PASSED))} of {len(self.checks)} passed"

    @property
    def missing(self) -> tuple[CheckResult, ...]:
        """The required checks that were not run."""
        return tuple(check for check in self.of(Outcome.NOT_RUN) if check.required)

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
            reference=document["reference"],
        )
        if record.passed != document["passed"]:
            raise VerificationError(
                "record", "its verdict does not follow from its checks", got=str(document["passed"])
            )
        try:
            _ = record.made_by
        except InvalidVersion as error:
            raise VerificationError("record", "was made by no version of this project", got=str(error)) from error
        for check in record.of(Outcome.PASSED):
            if check.found != check.expected:
                raise VerificationError(
                    "record",
                    f"{check.name} cannot have passed: what was found is not what was expected",
                    got=json.dumps(check.found)[:100],
                )
        return record

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record from a file. Raises VerificationError where it is none."""
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise VerificationError(f"record {path}", "cannot be read", got=str(error)) from error
        try:
            return cls.from_json(document)
        except VerificationError as error:
            raise VerificationError(f"record {path}", error.fact, got=error.got) from error

    def write(self, folder: Path) -> None:
        """Write the record and its JUnit form to a folder."""
        document = json.loads(json.dumps(self.to_json()))
        self.from_json(document)
        write_atomically(folder / JUNIT, junit(self))
        write_atomically(folder / RECORD, json.dumps(document, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Count:
    """How the checks of a group came out."""

    group: str
    passed: int
    failed: int
    not_run: int
    skipped: int
    """Of those that were not run, the ones that are not required."""
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
            sum(check.outcome is Outcome.NOT_RUN and not check.required for check in members),
            sum(check.seconds for check in members),
        )
        for group, members in groups.items()
    )


@dataclass(frozen=True)
class Difference:
    """Something that two records say differently, as JSON; None where one of them does not say it."""

    what: str
    old: Any
    new: Any


def differences(old: Record, new: Record) -> tuple[Difference, ...]:
    """Where two verifications differ in image, plan or outcome. Times, tools and where they ran do not count."""
    return _compare(_substance(old), _substance(new))


def tool_differences(old: Record, new: Record) -> tuple[Difference, ...]:
    """Where two verifications were done with other versions of the tools."""
    return _compare(_leaves("tools", old.tools), _leaves("tools", new.tools))


def _substance(record: Record) -> dict[str, Any]:
    """What a record says of its image, by name."""
    return {
        "digest": record.digest,
        "size": record.size,
        "cell": record.cell,
        **_leaves("plan", json.loads(json.dumps(record.plan))),
        **{
            check.name: {"outcome": str(check.outcome), "expected": check.expected, "found": check.found}
            for check in record.checks
        },
    }


def _leaves(name: str, value: Any) -> dict[str, Any]:
    """A JSON value taken apart: each innermost value by its path."""
    if isinstance(value, Mapping):
        parts = [(f"{name}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [(f"{name}[{number}]", item) for number, item in enumerate(value)]
    else:
        return {name: value}
    return {path: leaf for part, item in parts for path, leaf in _leaves(part, item).items()}


def _compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Difference, ...]:
    names = dict.fromkeys((*old, *new))
    return tuple(Difference(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name))


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
            errors=str(count.not_run - count.skipped),
            skipped=str(count.skipped),
            time=f"{count.seconds:.3f}",
        )
        for check in members:
            name = _clean(check.name.removeprefix(f"{check.group}."))
            case = ET.SubElement(suite, "testcase", classname=check.group, name=name, time=f"{check.seconds:.3f}")
            if check.outcome is not Outcome.PASSED:
                # To CI systems a skipped case looks like a pass; one that had to be run and was not must not.
                tag = "failure" if check.outcome is Outcome.FAILED else "error" if check.required else "skipped"
                verdict = ET.SubElement(case, tag, message=_clean(check.message or check.outcome), type=check.outcome)
                verdict.text = _clean(
                    f"expected: {json.dumps(check.expected)}\nfound: {json.dumps(check.found)}\nrepeat: {record.repeat}"
                )
    ET.indent(root)
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def _clean(text: str) -> str:
    """Text without the characters that XML cannot hold: most control characters, halves of surrogate pairs."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
