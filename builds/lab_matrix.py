"""The lab's representative cells, built and verified in one go, and the rules that exclude others proven true.

Nothing here knows the lab: it walks over cells of any matrix, and takes each rule at its word by compiling without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from . import compile as compiling
from . import engine as engines
from . import pipeline
from .console import Reporter, human_size, human_time
from .errors import BuildError, ExcludedError, HarnessError, VerificationError
from .model import ModuleType
from .oci import Image
from .pipeline import Run
from .plan import Inputs, ModuleSet, Plan

_COMPILING = tuple(f"compile {module_type}" for module_type in ModuleType)
"""Steps that compile modules."""


@dataclass(frozen=True)
class Walked:
    """What came of one cell."""

    cell: str
    outcome: str
    seconds: float
    compiling: float
    """Seconds of it that were spent on compiling modules."""
    size: int
    """Bytes of the image."""
    reused: int
    """Bytes of its layers that an earlier cell has as well."""
    problem: HarnessError | None = None


@dataclass(frozen=True)
class Claim:
    """A type that a rule leaves out for a kernel, and the rule's reason."""

    run: Run
    set: ModuleSet
    plan: Plan
    """A plan that knows no rules."""
    inputs: Inputs
    type: ModuleType
    reason: str


def walk(runs: Sequence[Run], report: Reporter) -> None:
    """Build and verify cells, then prove the rules that left something out; ends with a table of all.

    Goes on after a failure, and raises the first at the end. Raises VerificationError for a rule that is not true.
    """
    known: set[str] = set()
    walked, claims = [], []
    for number, run in enumerate(runs, 1):
        report.say(f"[{number} of {len(runs)}] {run.cell}", style="bold")
        walked.append(_cell(run, known))
        claims += _claims(run)
    proofs = [_prove(claim, report) for claim in _distinct(claims)]
    report.table(
        "Cells",
        ("cell", "outcome", "time", "of it compiling", "image", "shared with earlier cells"),
        (
            (
                one.cell,
                one.outcome,
                human_time(one.seconds),
                human_time(one.compiling),
                human_size(one.size) if one.size else "",
                f"{100 * one.reused // one.size} %" if one.size else "",
            )
            for one in walked
        ),
    )
    report.table("What rules leave out", ("type", "kernel", "reason", "the compiler says"), (row for row, _ in proofs))
    sizes = sum(one.size for one in walked)
    report.say(
        f"{sum(one.size > 0 for one in walked)} images of {len(walked)} cells in "
        f"{human_time(sum(one.seconds for one in walked))}, {human_size(sizes)}, "
        f"{100 * sum(one.reused for one in walked) // max(sizes, 1)} % of it shared"
    )
    problems = [one.problem for one in walked if one.problem] + [problem for _, problem in proofs if problem]
    if problems:
        raise problems[0]


def _cell(run: Run, known: set[str]) -> Walked:
    """Build and verify a cell; ``known`` are the layers that cells before it have, and learns of this one's."""
    began, before = monotonic(), len(run.report.steps)
    image: Image | None = None
    problem: HarnessError | None = None
    try:
        outcome = pipeline.verify_cell(run).summary
        image = pipeline.image_of(run)
    except ExcludedError as error:
        run.report.say(f"  {error.fact}: {error.got}", style="yellow")
        outcome = error.fact
    except HarnessError as error:
        run.report.fail(error)
        outcome, problem = f"{error.subject}: {error.fact}", error
    seconds = monotonic() - began
    compiling = sum(step.seconds for step in run.report.steps[before:] if step.title in _COMPILING)
    layers = {layer.descriptor.digest: layer.descriptor.size for layer in image.layers} if image else {}
    reused = sum(size for digest, size in layers.items() if digest in known)
    known.update(layers)
    return Walked(run.cell.id, outcome, seconds, compiling, image.size if image else 0, reused, problem)


def _claims(run: Run) -> list[Claim]:
    """What rules leave out of a cell, which may be all of it."""
    without = replace(run, matrix=replace(run.matrix, rules=()))
    try:
        made, inputs = pipeline.plan(without)
    except HarnessError:  # the walk has told of it
        return []
    return [
        Claim(without, one, made, inputs, rule.module_type, rule.reason)
        for one in made.sets
        for rule in run.matrix.rules
        if rule.applies(run.cell.driver, one.kernel.build.version)
    ]


def _distinct(claims: Iterable[Claim]) -> list[Claim]:
    """One claim of each reason for each driver, type and kernel version: flavours have the same sources."""
    first: dict[object, Claim] = {}
    for claim in claims:
        first.setdefault((claim.run.cell.driver, claim.type, claim.set.kernel.build.version, claim.reason), claim)
    return list(first.values())


def _prove(claim: Claim, report: Reporter) -> tuple[tuple[str, ...], HarnessError | None]:
    """Compile what a rule leaves out: a row of the table, and what is wrong with the rule if it can be compiled."""
    run, build = claim.run, claim.set.kernel.build
    said = ""
    problem: HarnessError | None = None
    try:
        compiling.modules(
            claim.plan,
            claim.set,
            claim.inputs,
            claim.type,
            engine=engines.connect(),
            cache=run.cache,
            jobs=run.settings.jobs,
            logs=run.logs,
            report=report,
        )
    except BuildError as error:
        said = error.got or error.fact
        if not _agree(claim.reason, said):
            problem = VerificationError(
                f"the rule for {run.cell.driver} {claim.type}",
                f"gives a reason that the compiler does not: {claim.reason}",
                got=said,
                hint=error.hint,
            )
    except HarnessError as error:  # nothing is known of the rule; the table of the cells is told all the same
        said, problem = error.fact, error
    else:
        problem = VerificationError(
            f"the rule for {run.cell.driver} {claim.type}",
            f"is not true for kernel {build.release}: it compiles",
            got=claim.reason,
        )
    return (f"{run.cell.driver} {claim.type}", f"{build.release} ({build.package})", claim.reason, said), problem


def _agree(reason: str, said: str) -> bool:
    """Whether a reason names what the compiler names: a quoted name, or the folder that the package does not have.

    What names nothing agrees with no reason: a compiler that was killed says nothing about the kernel.
    """
    named = re.findall(r"['‘]([A-Za-z_]\w+)['’]", said) or re.findall(r"^no ([\w-]+)/", said)
    return any(re.search(rf"\b{re.escape(name)}\b", reason) for name in named)
