"""How the checks of an image are run, and how each outcome is told to whoever started them.

``builds.verify`` starts pytest with a subject (``--subject``) and a pipe (``--events``). One test case is one check
of one object; the objects come from what is expected, so that nothing passes because it was not there. A check
passes only by comparing something: see :class:`Compare`.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import json
import os
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from builds.errors import BuildError, HarnessError, InfrastructureError, Kind
from builds.oci import Image
from builds.record import CheckResult, Outcome
from builds.rootfs import open_rootfs
from builds.verify import Subject

from .evidence import UNREADABLE, Expected, Found
from .guests import Guests
from .inside import Inside, open_inside

_PR_SET_PDEATHSIG = 1
_EXPECTED = pytest.StashKey[Expected]()
_CALLS = pytest.StashKey["list[Difference]"]()
_SECONDS = pytest.StashKey[float]()
_PROBLEM = pytest.StashKey["Verdict | None"]()
_SKIPPED = pytest.StashKey[bool]()
"""Whether a check itself says that it cannot be run here; only then may one that is not required be left out."""

Verdict = tuple[Outcome, Any, Any, str]
"""Outcome, expected, found and message of a check."""


class Difference(AssertionError):  # noqa: N818  # it is what it is, also when both sides agree
    """A comparison: what was found against what was expected."""

    def __init__(self, found: object, expected: object, hint: str) -> None:
        super().__init__(hint)
        self.found, self.expected, self.hint = _plain(found), _plain(expected), hint


class Compare:
    """Compares, and keeps both sides for the record."""

    def __init__(self, calls: list[Difference]) -> None:
        self._calls = calls

    def __call__(self, found: object, expected: object, hint: str = "") -> None:
        """Fail unless both are equal; order counts in lists only. ``hint`` says what it means where they are not."""
        outcome = Difference(found, expected, hint)
        self._calls.append(outcome)
        if outcome.found != outcome.expected:
            raise outcome


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("verification")
    group.addoption("--subject", type=Path, help="what to check, as builds.verify writes it")
    group.addoption("--events", type=int, help="file descriptor that each outcome is written to")
    group.addoption("--parent", type=int, help="process that must be alive for the run to go on")


def pytest_configure(config: pytest.Config) -> None:
    subject = config.getoption("--subject")
    if subject is None:
        raise pytest.UsageError("these are the checks of an image: `nox -s verify` runs them")
    _die_with(config.getoption("--parent"))
    config.stash[_EXPECTED] = Expected(Subject.read(subject))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    expected = metafunc.config.stash[_EXPECTED]
    objects: dict[str, Any] = {
        "module": lambda: expected.modules,
        "module_type": lambda: expected.module_types,
        "loads": lambda: expected.loads,
        "control": lambda: expected.controls,
        "fact": lambda: expected.facts,
        "file": lambda: expected.files,
        "link": lambda: expected.links,
        "elf": lambda: expected.elves,
        "library": lambda: expected.libraries,
        "program": lambda: expected.programs,
        "part": lambda: expected.installer,
        "component": lambda: expected.components,
    }
    for name in set(metafunc.fixturenames) & objects.keys():
        values = objects[name]()
        metafunc.parametrize(name, values, ids=[str(getattr(value, "dest", value)) for value in values])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups = config.stash[_EXPECTED].subject.groups
    chosen = [item for item in items if _name(item)[0].partition(".")[0] in groups]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_collection_finish(session: pytest.Session) -> None:
    names = [_name(item) for item in session.items]
    if twice := {name for name in names if names.count(name) > 1}:
        raise pytest.UsageError(f"checks of one name: {sorted(twice)}")
    _tell(session.config, {"collected": names})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    seconds = item.stash[_SECONDS] = item.stash.get(_SECONDS, 0.0) + call.duration
    problem = item.stash[_PROBLEM] = item.stash.get(_PROBLEM, None) or _problem(item, call)
    if call.when == "teardown":
        required = _is_required(item) or not (problem is None or item.stash.get(_SKIPPED, False))
        result = CheckResult(*_name(item), *(problem or _pass(item)), round(seconds, 3), required)
        _tell(item.config, asdict(result))
    return report


def _pass(item: pytest.Item) -> Verdict:
    calls = item.stash.get(_CALLS, [])
    if not calls:
        return Outcome.NOT_RUN, None, None, "it compared nothing"
    return Outcome.PASSED, calls[-1].expected, calls[-1].found, ""


def _problem(item: pytest.Item, call: pytest.CallInfo[None]) -> Verdict | None:
    """What went wrong in a phase of a test, if anything did.

    A damaged or incomplete image fails; surroundings that fail, and whatever nobody thought of, prove nothing.
    """
    if call.excinfo is None:
        return None
    error = call.excinfo.value
    if isinstance(error, Difference):
        return Outcome.FAILED, error.expected, error.found, error.hint
    if isinstance(error, HarnessError) and error.kind in (Kind.BUILD, Kind.VERIFICATION):
        return Outcome.FAILED, None, None, str(error)
    if isinstance(error, HarnessError | pytest.skip.Exception):
        item.stash[_SKIPPED] = isinstance(error, pytest.skip.Exception)
        return Outcome.NOT_RUN, None, None, str(error)
    return Outcome.NOT_RUN, None, None, f"{type(error).__name__}: {error}"


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Compare:
    """Compares what was found with what was expected; whatever a check proves, it proves by this."""
    return Compare(request.node.stash.setdefault(_CALLS, []))


@pytest.fixture(scope="session")
def expected(request: pytest.FixtureRequest) -> Expected:
    """What the image must hold."""
    return request.config.stash[_EXPECTED]


@pytest.fixture(scope="session")
def subject(expected: Expected) -> Subject:
    """The image, and where expectations come from."""
    return expected.subject


@pytest.fixture(scope="session")
def image(subject: Subject) -> Image:
    """The image, by its manifest and config."""
    return subject.image


@pytest.fixture(scope="session")
def opened(image: Image, expected: Expected) -> Iterator[Found | str]:
    """What the image holds, or why its layers cannot be read."""
    with contextlib.ExitStack() as stack:
        try:
            rootfs = stack.enter_context(open_rootfs(image, expected.subject.scratch))
        except (BuildError, *UNREADABLE) as error:
            yield f"{type(error).__name__}: {error}"
            return
        yield Found(image, rootfs, expected)


@pytest.fixture(scope="session")
def found(opened: Found | str) -> Found:
    """What the image holds. Where it cannot be read one check says so, and the others are not run."""
    if isinstance(opened, str):
        raise InfrastructureError("image", "its layers cannot be read: layers.readable")
    return opened


@pytest.fixture(scope="session")
def inside(subject: Subject) -> Iterator[Inside]:
    """A container of the image, which does nothing but stand by."""
    with open_inside(subject) as made:
        yield made


@pytest.fixture(scope="session")
def guests(found: Found) -> Guests:
    """The virtual machines into whose kernels the image's modules are loaded, booted as they are asked for."""
    return Guests(found)


def _name(item: pytest.Item) -> tuple[str, str]:
    """Id and object of a test's check."""
    marker = item.get_closest_marker("check")
    if marker is None:
        raise pytest.UsageError(f"{item.nodeid} does not say which check it is")
    callspec = getattr(item, "callspec", None)
    return str(marker.args[0]), str(callspec.id) if callspec else ""


def _is_required(item: pytest.Item) -> bool:
    """Whether an image cannot pass without the check; where it can, its mark says ``required=False``."""
    marker = item.get_closest_marker("check")
    return bool(marker is None or marker.kwargs.get("required", True))


def _tell(config: pytest.Config, event: Mapping[str, Any]) -> None:
    descriptor = config.getoption("--events")
    if descriptor is not None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]


def _die_with(parent: int | None) -> None:
    """End in good order when told to, and when the process that started us is gone."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if parent is not None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise pytest.UsageError("whoever started the checks is gone")


def _plain(value: object) -> Any:
    """A value as JSON has it; sets sorted."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
