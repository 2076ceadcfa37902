"""What runs leave in the output folder of a cell, and what a later run or a reader learns from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import image as packing
from . import matrix, oci
from . import plan as planning
from .cache import write_atomically
from .console import Reporter, Step, human_size, human_time
from .errors import ExcludedError, HarnessError, InfrastructureError, Kind
from .model import Cell
from .oci import Image
from .plan import Plan
from .record import RECORD, Record

PLAN = "plan.json"
IMAGE = "image"
"""The OCI layout of the cell's image."""
MODULES = "modules"
LOGS = "logs"
PUSHED = "push.json"
STEPS = "steps.json"
"""The steps of each session's last work on the cell, with their times."""
FAILURE = "failure.json"
"""Why the last session's work on the cell failed; not there if it did not."""


def read_plan(folder: Path) -> Plan | None:
    """The plan that a run left; None where there is none, or one of another version of this project."""
    try:
        return Plan.from_json(json.loads((folder / PLAN).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HarnessError):
        return None


def write_plan(folder: Path, plan: Plan) -> None:
    """Leave a plan."""
    write_atomically(folder / PLAN, json.dumps(plan.to_json(), indent=1, sort_keys=True) + "\n")


def made(out: Path, cells: Iterable[Cell]) -> set[Cell]:
    """The cells whose image is in their folder below ``out``, and is what the same inputs would give again."""
    return {cell for cell in cells if (left := read_plan(out / cell.id)) and _is_made(left, out / cell.id / IMAGE)}


def write_steps(folder: Path, session: str, steps: Sequence[Step]) -> None:
    """Leave the steps of a session; not where the disk is full, for they are worth less than what led to that."""
    took = {**_read(folder / STEPS), session: [asdict(step) for step in steps]}
    with suppress(InfrastructureError):
        write_atomically(folder / STEPS, json.dumps(took, indent=1))


def write_failure(folder: Path, session: str, error: Exception) -> None:
    """Leave why a session failed; not where the disk is full, for the error itself is worth more."""
    if isinstance(error, ExcludedError):
        kind = "excluded"
    else:  # what is no error of ours is the surroundings'
        kind = (error.kind if isinstance(error, HarnessError) else Kind.INFRASTRUCTURE).name.lower()
    failure = {"session": session, "kind": kind, "error": str(error)}
    with suppress(InfrastructureError):
        write_atomically(folder / FAILURE, json.dumps(failure, indent=1) + "\n")


def forget_failure(folder: Path) -> None:
    """A new session begins: what comes of it counts."""
    (folder / FAILURE).unlink(missing_ok=True)


def summary(folders: Mapping[Cell, Path], report: Reporter) -> None:
    """Print what came of each cell: digest, size, time per step, checks passed, or why it failed."""
    rows, images = [], []
    for cell, folder in folders.items():
        steps = [step for session in _read(folder / STEPS).values() for step in session]
        took = {step["title"]: step["seconds"] for step in steps}
        layout = folder / IMAGE
        try:
            image = oci.find_image(layout, arch=cell.arch) if (layout / "oci-layout").is_file() else None
            outcome = _outcome(cell, folder, image)
        except HarnessError as error:  # what is wrong with one cell's folder keeps nobody from the others
            image, outcome = None, f"{error.subject}: {error.fact}"
        facts = (cell.id, image.digest[:19] if image else "no image", human_size(image.size) if image else "")
        # A step has a row of its own: a long title takes two lines.
        first, *others = [(title, human_time(seconds)) for title, seconds in took.items()] or [("", "")]
        rows += [(*facts, *first, outcome), *(("", "", "", *step, "") for step in others)]
        if image:
            images.append(f"oci:{layout}  {image.digest}")
    report.table("Summary", ("cell", "digest", "size", "step", "time", "outcome"), rows)
    for line in images:
        report.say(line)


def _outcome(cell: Cell, folder: Path, image: Image | None) -> str:
    """The last failure, or what the record says of the image; of another image it says nothing."""
    if failure := _read(folder / FAILURE):
        told = failure["error"].partition("\n")[0].removeprefix(f"cell {cell}: ")
        return told if failure["kind"] == "excluded" else f"{failure['session']} failed: {told}"
    if image is None or not (folder / RECORD).is_file():
        return "not verified"
    record = Record.read(folder / RECORD)
    return record.summary if record.digest == image.digest else "not verified"


def _is_made(left: Plan, layout: Path) -> bool:
    try:
        of = matrix.matrix_of(left.cell)
        if not {sibling.gl for sibling in of.siblings(left.cell)} <= {gl for one in left.sets for gl in one.releases}:
            return False  # a build would look at kernels that the plan knows nothing of
        now = planning.again(left, of)
        image = oci.find_image(layout, now.names[0], now.cell.arch)
    except (OSError, HarnessError):
        return False
    labels = (image.config.get("config") or {}).get("Labels") or {}
    return bool(labels.get(f"{packing.PREFIX}.plan-key") == now.image)


def _read(path: Path) -> dict[str, Any]:
    """A document of ours; empty where there is none that can be read."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
