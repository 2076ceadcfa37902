"""Verify: prove an image right before anyone can push it, and write down how.

The checks are pytest suites in ``tests/image/``; here they are given their subject, run apart in a process of their
own, and judged. What they expect comes from the plan, the kmodbuild image and the driver package, never from the
image itself. Every outcome but a pass of every check is an error, also when nothing could be run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import requests
from docker.errors import DockerException

from . import __version__, kmod, loading, machine, oci, recipes
from . import compile as compiling
from . import engine as engines
from .cache import Cache, disk_errors, key_of, write_atomically
from .console import Reporter, shorten
from .engine import Engine
from .errors import ConfigurationError, HarnessError, InfrastructureError, VerificationError
from .image import Compiled
from .model import ModuleType
from .plan import Inputs, ModuleSet, Plan
from .record import JUNIT, RECORD, CheckResult, Outcome, Record, counts

PROJECT = Path(__file__).parent.parent
SUITES = PROJECT / "tests" / "image"
"""The checks; they come with the project, not with the package."""

GROUPS = ("modules", "driver-root", "installer", "layers", "config", "tags", "runtime", "load")
"""What every verification must have checks of."""

LOG = "verify.log"

_SHOWN = 10  # failures that are printed; the record has all
_PYTEST = {
    2: "the run of the checks was interrupted",
    3: "pytest failed within",
    4: "pytest was called wrongly",
    5: "no check was collected",
}
"""pytest's own statuses, but for 0 (all passed) and 1 (some failed)."""

_EMPTY_MODULE = {
    "Kbuild": "obj-m := empty.o\n",
    "empty.c": '#include <linux/module.h>\nMODULE_LICENSE("GPL");\nMODULE_DESCRIPTION("empty");\n',
    "compile.sh": 'set -eu\nmake -C "$SYSOUT" M=/src modules\nmkdir /out\ncp /src/empty.ko /out/\n',
}


@dataclass(frozen=True)
class Subject:
    """What the checks are told: the image, and where their expectations come from."""

    layout: Path
    digest: str
    names: tuple[str, ...]
    """Full names under which the image was found."""
    complete: bool
    """Whether these are all names it has, so that a missing one counts."""
    plan: Plan
    symvers: Mapping[str, Path]
    """``Module.symvers`` of the kernel, by module set."""
    tree: Path
    """The driver package, unpacked."""
    components: Mapping[str, Path]
    """The components' archives, unpacked, by name."""
    base: tuple[str, ...]
    """Diff ids of the base image's layers."""
    base_blobs: tuple[str, ...]
    """Digests of its layers' blobs."""
    modules: Compiled
    """Folders of the plan's modules, of those sets and types that were compiled here."""
    vermagic: Mapping[str, str]
    """What modules for the kernel carry, by module set: that of an empty module compiled in the kmodbuild container."""
    engine: str | None
    """Where the container engine answers, as ``DOCKER_HOST`` spells it."""
    loaded: str | None
    """Name of the image in the engine."""
    missing: str
    """Why a ``vermagic`` or ``loaded`` is missing."""
    prepared: Mapping[str, tuple[Path, Path]]
    """Folders of the kernel and of the guest's program, by module set, for the virtual machine."""
    unprepared: Mapping[str, str]
    """Why a module set can be loaded into no virtual machine."""
    logs: Path
    """Where a virtual machine's console goes."""
    groups: tuple[str, ...]
    """Groups of checks to run."""
    private: tuple[str, ...]
    """Paths of this machine, which no image may mention."""
    scratch: Path

    def write(self, path: Path) -> None:
        """Write the subject to a file."""
        document = {**asdict(self), "plan": self.plan.to_json()}
        write_atomically(path, json.dumps(document, default=str))

    @classmethod
    def read(cls, path: Path) -> Subject:
        """Read a subject back."""
        document = json.loads(path.read_text())
        values = {
            **document,
            "plan": Plan.from_json(document["plan"]),
            **{name: Path(document[name]) for name in ("layout", "tree", "scratch", "logs")},
            **{name: tuple(document[name]) for name in ("names", "base", "base_blobs", "groups", "private")},
            "components": {name: Path(path) for name, path in document["components"].items()},
            "symvers": {of: Path(path) for of, path in document["symvers"].items()},
            "prepared": {of: (Path(one), Path(two)) for of, (one, two) in document["prepared"].items()},
            "modules": {
                of: {ModuleType(name): Path(folder) for name, folder in folders.items()}
                for of, folders in document["modules"].items()
            },
        }
        return cls(**values)

    @property
    def image(self) -> oci.Image:
        """The image. Raises BuildError where the layout lacks or damages it."""
        path = oci.blob_path(self.layout, self.digest)
        size = path.stat().st_size if path.is_file() else 0
        return oci.read_image(self.layout, oci.Descriptor(oci.MANIFEST, self.digest, size))


def run(
    plan: Plan,
    inputs: Inputs,
    image: oci.Image,
    *,
    engine: Engine | None,
    cache: Cache,
    out: Path,
    report: Reporter,
    repeat: str,
    modules: Compiled | None = None,
    names: Sequence[str] | None = None,
    reference: str | None = None,
    kernels: Path | None = None,
    groups: Sequence[str] = GROUPS,
) -> Record:
    """Hold an image against a plan; leaves ``record.json``, ``junit.xml`` and ``logs/verify.log`` in ``out``.

    ``modules`` are the folders of the plan's modules as far as they were compiled here. ``names`` are the full names
    under which the image was found; None: those that its layout gives it, and then all names of the plan must be
    there. ``reference`` is what the user called the image, ``kernels`` where KERNEL_IMAGE has kernels. Without an
    engine the checks that run something are not run, nor are those that are not in ``groups``; a check that was not
    run is no pass, but for those that load modules: whether they are demanded is for a push to say.
    Raises, after the record is written, VerificationError where a check failed, and InfrastructureError where none
    failed but not all could be run.
    """
    if not (SUITES / "conftest.py").is_file():
        raise InfrastructureError(
            "verify", f"the checks are missing: {SUITES}", hint="run it in a checkout of the project"
        )
    (out / "logs").mkdir(parents=True, exist_ok=True)
    _drop_stale(out, image.digest)
    missing: list[str] = []
    vermagic: dict[str, str] = {}
    for one in plan.sets:
        try:
            empty = reference_module(plan, one, inputs, engine=engine, cache=cache, report=report)
        except InfrastructureError as error:
            missing.append(_first_line(error))
        else:
            vermagic[one.id] = empty.one("vermagic") or ""
    tree = compiling.driver_tree(plan, inputs, cache, report)
    prepared: dict[str, tuple[Path, Path]] = {}
    unprepared: dict[str, str] = {}
    for one in plan.sets if "load" in groups else ():
        try:
            ready = loading.prepare(plan, one, inputs, kernels, engine=engine, cache=cache, report=report)
        except ConfigurationError:
            raise
        except HarnessError as error:
            unprepared[one.id] = str(error).replace("\n", "; ")
        else:
            prepared[one.id] = (ready.kernel.folder.absolute(), ready.guest.absolute())
    with _in_engine(engine, image, report, missing) as loaded, report.step("verify") as step:
        subject = Subject(
            layout=image.layout.absolute(),
            digest=image.digest,
            names=tuple(names if names is not None else oci.full_names_of(image.layout, image.digest)),
            complete=names is None,
            plan=plan,
            symvers={of: lying.symvers.absolute() for of, lying in inputs.sets.items()},
            tree=tree.absolute(),
            components={name: path.absolute() for name, path in inputs.components.items()},
            base=tuple(layer.diff_id for layer in inputs.base.layers),
            base_blobs=tuple(layer.descriptor.digest for layer in inputs.base.layers),
            modules=dict(modules or {}),
            vermagic=vermagic,
            engine=engine.url if engine else None,
            loaded=loaded,
            missing="; ".join(missing),
            prepared=prepared,
            unprepared=unprepared,
            logs=(out / "logs").absolute(),
            groups=tuple(groups),
            private=tuple(sorted({str(path.absolute()) for path in (PROJECT, cache.root, out, inputs.package.parent)})),
            scratch=(cache.root / "tmp").absolute(),
        )
        checks = _checks(subject, out / "logs" / LOG, engine, report)
        record = Record(
            digest=image.digest,
            size=image.size,
            names=subject.names,
            cell=plan.cell.id,
            plan=plan.to_json(),
            checks=checks,
            tools=_tools(plan, engine),
            repeat=repeat,
            reference=reference,
        )
        record.write(out)
        step.note(record.summary)
    show(record, report)
    _judge(record)
    return record


def show(record: Record, report: Reporter) -> None:
    """Print a record: a line per group of checks, then the first that did not pass."""
    report.table(
        f"Checks of {record.cell} {record.digest[:19]}",
        ("group", "passed", "failed", "not run", "seconds"),
        (
            (count.group, str(count.passed), str(count.failed), str(count.not_run), f"{count.seconds:.1f}")
            for count in counts(record.checks)
        ),
    )
    failed, not_run = record.of(Outcome.FAILED), record.of(Outcome.NOT_RUN)
    for check in failed[:_SHOWN]:
        report.say(f"failed: {check.name}", style="red")
        if check.message:
            report.say(f"  {shorten(check.message)}")
        if (check.expected, check.found) != (None, None):
            report.say(f"  expected: {shorten(check.expected)}")
            report.say(f"  found:    {shorten(check.found)}")
    for check in not_run[:_SHOWN]:
        optional = "" if check.required else " (not required)"
        report.say(f"not run{optional}: {check.name}: {shorten(check.message)}", style="yellow")
    for kind, found in (("failed", failed), ("were not run", not_run)):
        if len(found) > _SHOWN:
            report.say(f"… {len(found) - _SHOWN} more {kind}; record.json has them all")


def reference_module(
    plan: Plan, of: ModuleSet, inputs: Inputs, *, engine: Engine | None, cache: Cache, report: Reporter
) -> kmod.Module:
    """An empty module compiled in the kmodbuild container: what any module for this kernel has in common.

    Compiled once per kernel build and compiler. Raises InfrastructureError without an engine that can, BuildError
    where the container cannot compile it.
    """

    def build(folder: Path) -> None:
        if engine is None:
            raise InfrastructureError("reference module", "needs a container engine", got="none that answers")
        way = compiling.way(of, inputs, engine)
        with report.step("compile reference module") as step:
            compiling.small(plan, of, inputs, _EMPTY_MODULE, folder, engine=engine, report=report)
            step.note(f"{of.kernel.build.release} ({of.kernel.build.package}), {way}")

    key = key_of(
        kernel=asdict(of.kernel.build), output=of.kernel.output, compiler=of.kernel.compiler, source=_EMPTY_MODULE
    )
    folder, _ = cache.make("reference", key, build)
    return kmod.read_module("empty.ko", (folder / "empty.ko").read_bytes())


def not_loaded(record: Record) -> str | None:
    """Why a record does not prove that the image's modules load; None where it does."""
    checks = [check for check in record.checks if check.group == "load"]
    if not checks:
        return "none was tried"
    lacking = next((check for check in checks if check.outcome is not Outcome.PASSED), None)
    return (lacking.message or lacking.name) if lacking else None


def _drop_stale(out: Path, digest: str) -> None:
    """Remove a record of other bytes. One of the same image stands until this run replaces it: it is still true."""
    try:
        stale = Record.read(out / RECORD).digest != digest
    except VerificationError:
        stale = True
    if stale:
        for name in (RECORD, JUNIT):
            (out / name).unlink(missing_ok=True)


def known_checks() -> frozenset[str]:
    """Ids of all checks there are, as the suites mark them."""
    marks = (re.findall(r'mark\.check\("([a-z.-]+)"', path.read_text()) for path in SUITES.glob("test_*.py"))
    return frozenset(name for found in marks for name in found)


def trouble(status: int) -> str | None:
    """Why a run of pytest with this status says nothing of the checks that it did not report; None if it is whole."""
    if status in (0, 1):
        return None
    if status < 0:
        return f"the run of the checks was killed by {signal.Signals(-status).name}"
    return _PYTEST.get(status, f"the run of the checks ended with status {status}")


def conclude(
    collected: Sequence[tuple[str, str]], done: Mapping[tuple[str, str], CheckResult], status: int
) -> list[CheckResult]:
    """The results of a run: those reported, and ``not run`` for whatever was collected or demanded and has none."""
    why = trouble(status)
    if why is None and status == 1 and not _is_bad(done.values()):
        why = "something besides the checks failed"
    results = [done.get(each) or _not_run(*each, why or "the run of the checks ended before it") for each in collected]
    results += [check for each, check in done.items() if each not in collected]
    there = {check.group for check in results}
    none = "none was run"
    results += [_not_run(f"{group}.any", "", why or none) for group in GROUPS if group not in there]
    if why and not _is_bad(results):
        results.append(_not_run("run.complete", "", why))
    return results


def _is_bad(checks: Iterable[CheckResult]) -> bool:
    """Whether any of the checks keeps an image from passing."""
    return any(
        check.outcome is Outcome.FAILED or (check.required and check.outcome is not Outcome.PASSED) for check in checks
    )


def _not_run(check: str, thing: str, why: str) -> CheckResult:
    return CheckResult(check, thing, Outcome.NOT_RUN, None, None, why, 0.0)


def _judge(record: Record) -> None:
    failed, not_run = record.of(Outcome.FAILED), record.missing
    first = [check.name for check in (failed or not_run)[:3]]
    subject, total = f"image {record.digest[:19]} of {record.cell}", len(record.checks)
    if failed:
        raise VerificationError(
            subject,
            f"{len(failed)} of {total} checks failed" + (f", {len(not_run)} were not run" if not_run else ""),
            got=", ".join(first) + (" …" if len(failed) > len(first) else ""),
            repeat=record.repeat,
        )
    if not record.passed:
        raise InfrastructureError(
            subject,
            f"{len(not_run)} of {total} checks were not run, which is not a pass",
            got=", ".join(first) + (" …" if len(not_run) > len(first) else ""),
            hint=not_run[0].message if not_run else None,
            repeat=record.repeat,
        )


@contextmanager
def _in_engine(engine: Engine | None, image: oci.Image, report: Reporter, missing: list[str]) -> Iterator[str | None]:
    """What the engine calls the image: its id, or where it has none yet a name to load it under meanwhile.

    Never one of the names it came with: they may be what is wrong with it. None where there is no engine, or it
    does not take the image; ``missing`` is told why.
    """
    name = f"gardenlinux-nvidia-builds/verify:{image.digest[7:19]}"
    if engine is None:
        missing.append("no container engine answers")
        yield None
        return
    if _has(engine, image.config_descriptor.digest):
        yield image.config_descriptor.digest
        return
    try:
        engines.load(engine, image, [name], report)
    except HarnessError as error:  # a damaged image included: the checks that read it say so
        missing.append(_first_line(error))
        yield None
        return
    try:
        yield name
    finally:
        with suppress(DockerException, requests.RequestException):
            engine.client.images.remove(name, force=True)


def _has(engine: Engine, identity: str) -> bool:
    try:
        engine.client.images.get(identity)
    except (DockerException, requests.RequestException):
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _checks(subject: Subject, log: Path, engine: Engine | None, report: Reporter) -> tuple[CheckResult, ...]:
    """Run the suites in a process of their own, which reports each outcome as it comes through a pipe."""
    collected: list[tuple[str, str]] = []
    done: dict[tuple[str, str], CheckResult] = {}
    with disk_errors("verify", log.parent):
        described = log.with_name("subject.json")
        subject.write(described)
        reader, writer = os.pipe()
        with os.fdopen(reader, encoding="utf-8") as events, log.open("wb") as output:
            try:
                child = subprocess.Popen(
                    _command(described, writer),
                    cwd=PROJECT,
                    env=_environment(engine),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writer,),
                )
            finally:
                os.close(writer)
            try:
                for event in _events(events):
                    if "collected" in event:
                        collected = [(check, thing) for check, thing in event["collected"]]
                        break
                with report.units("checks", len(collected) or None) as advance:
                    for event in _events(events):
                        check = CheckResult(**{**event, "outcome": Outcome(event["outcome"])})
                        done[check.id, check.object] = check
                        advance(1)
                status = child.wait()
            except BaseException:
                child.terminate()
                child.wait()
                raise
    results = conclude(collected, done, status)
    if why := trouble(status):
        report.say(f"  {why}; see {log}", style="yellow")
    return tuple(results)


def _events(stream: Any) -> Iterator[dict[str, Any]]:
    for line in stream:
        if line.endswith("\n"):  # half a line is what a killed process leaves
            yield json.loads(line)


def _command(subject: Path, events: int) -> list[str]:
    """How pytest is called: with the suites' own configuration, and no plugin but those named."""
    suites = SUITES.relative_to(PROJECT)
    return [
        *(sys.executable, "-m", "pytest", str(suites)),
        *("-c", str(suites / "pytest.ini"), "--rootdir", ".", "--confcutdir", str(suites)),
        *("-p", "no:cacheprovider", "--subject", str(subject.absolute())),
        *("--events", str(events), "--parent", str(os.getpid())),
    ]


def _environment(engine: Engine | None) -> dict[str, str]:
    """The environment of the checks: nothing in it that would change pytest, and the engine that we use ourselves."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ours = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if engine:
        ours |= {"DOCKER_HOST": engine.url, "CONTAINER_HOST": engine.url}
    return kept | ours


def _tools(plan: Plan, engine: Engine | None) -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("pytest", "pytest-testinfra", "pyelftools")}
    return {
        "harness": __version__,
        "checks": recipes.CHECKS,
        "python": platform.python_version(),
        **packages,
        "engine": engine.version if engine else "none",
        "qemu": machine.version(plan.cell.arch) if machine.program(plan.cell.arch) else "none",
    }
