"""The verdict: what a run of the checks amounts to, and the record of it. No check is run here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from builds import components, recheck, verify
from builds.errors import InfrastructureError, VerificationError
from builds.record import (
    CheckResult,
    Difference,
    Outcome,
    Record,
    counts,
    differences,
    junit,
    tool_differences,
)
from builds.verify import GROUPS, conclude, trouble

ALL = [(f"{group}.check", "") for group in GROUPS]


def result(check: str, outcome: Outcome = Outcome.PASSED, thing: str = "") -> CheckResult:
    return CheckResult(check, thing, outcome, 1, 1, "", 0.5)


def passed(*names: tuple[str, str]) -> dict[tuple[str, str], CheckResult]:
    return {(check, thing): result(check, thing=thing) for check, thing in names}


def record(*checks: CheckResult, **more: Any) -> Record:
    values: dict[str, Any] = {
        "digest": "sha256:" + "a" * 64,
        "size": 12,
        "names": ("reg/img:1",),
        "cell": "550.163.01-debian12-amd64-cloud",
        "plan": {"image": "key"},
        "checks": checks,
        "tools": {"harness": "0.1.0", "checks": "c" * 64, "python": "3"},
        "repeat": "nox -s verify",
    }
    return Record(**{**values, **more})


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ({}, {}),
        ({"image_path": "reg/driver"}, {"IMAGE_PATH": "reg/driver"}),
        ({"base": {"reference": "reg/gl:1877.3"}}, {"GL_REGISTRY": "reg/gl"}),
        ({"base": {"reference": "oci:1877.3"}}, {}),
        ({"package": {"checksum": "own"}}, {"PACKAGE_SHA256": "optional"}),
        ({"package": {"checksum": "published"}, "components_absent": {"imex": "not listed"}}, {}),
        ({"components_absent": {"imex": components.NO_SOURCE}}, {"NVIDIA_REDIST_URL": "none"}),
        ({"base": 1, "package": [], "components_absent": "x"}, {}),
    ],
)
def test_a_record_tells_the_settings_that_its_plan_was_made_with(plan: Any, settings: dict[str, str]) -> None:
    assert recheck._settings_of(record(plan=plan)) == settings


@pytest.mark.parametrize("status", [0, 1])
def test_a_whole_run_has_no_trouble(status: int) -> None:
    assert trouble(status) is None


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (2, "interrupted"),
        (3, "failed within"),
        (4, "called wrongly"),
        (5, "no check was collected"),
        (9, "status 9"),
        (-9, "SIGKILL"),
        (-15, "SIGTERM"),
    ],
)
def test_pytests_own_statuses_are_never_a_pass(status: int, says: str) -> None:
    why = trouble(status)
    assert why
    assert says in why
    results = conclude(ALL, passed(*ALL), status)
    assert not record(*results).passed
    assert any(says in check.message for check in results)


def test_all_passed_is_a_pass() -> None:
    results = conclude(ALL, passed(*ALL), 0)
    assert [check.id for check in results] == [check for check, _ in ALL]
    assert record(*results).passed


def test_zero_collected_is_no_pass_whatever_pytest_says() -> None:
    for status in (0, 1, 5):
        results = conclude([], {}, status)
        assert {check.outcome for check in results} == {Outcome.NOT_RUN}
        assert not record(*results).passed


def test_a_group_without_checks_is_no_pass() -> None:
    some = ALL[1:]
    missing = [check for check in conclude(some, passed(*some), 0) if check.outcome is Outcome.NOT_RUN]
    assert [check.id for check in missing] == [f"{GROUPS[0]}.any"]


def test_what_was_collected_but_not_reported_was_not_run() -> None:
    results = conclude(ALL, passed(*ALL[:-1]), -9)
    assert results[-1].outcome is Outcome.NOT_RUN
    assert "SIGKILL" in results[-1].message


def test_a_failure_that_no_check_reported_is_no_pass() -> None:
    assert not record(*conclude(ALL, passed(*ALL), 1)).passed


@pytest.mark.parametrize("status", [1, 3, -9])
def test_a_check_that_is_not_required_hides_no_crash(status: int) -> None:
    """It was not run, all others passed, and then something else went wrong."""
    optional = CheckResult("modules.bytes", "", Outcome.NOT_RUN, None, None, "not here", 0.0, required=False)
    done = {**passed(*ALL), ("modules.bytes", ""): optional}
    assert record(*conclude([*ALL, ("modules.bytes", "")], done, 0)).passed
    assert not record(*conclude([*ALL, ("modules.bytes", "")], done, status)).passed


def test_no_checks_are_no_pass() -> None:
    assert not record().passed


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    made = record(
        result("modules.vermagic", thing="open/nvidia.ko"),
        CheckResult("tags.expected", "", Outcome.FAILED, ["a"], {"b": None}, "not so \x01", 0.25),
        CheckResult("runtime.tools", "nvidia-smi", Outcome.NOT_RUN, None, None, "no engine", 0.0),
    )
    made.write(tmp_path)
    assert Record.read(tmp_path / "record.json") == made
    assert not made.passed
    ET.fromstring(junit(record(result("a.b", Outcome.FAILED, thing="odd\x07\udc80name"))))
    root = ET.parse(tmp_path / "junit.xml").getroot()
    cases = {(case.get("classname"), case.get("name")): [child.tag for child in case] for case in root.iter("testcase")}
    assert cases == {
        ("modules", "vermagic[open/nvidia.ko]"): [],
        ("tags", "expected"): ["failure"],
        ("runtime", "tools[nvidia-smi]"): ["error"],
    }
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["junit.xml", "record.json"]


def test_junit_counts_each_group() -> None:
    made = record(result("modules.a"), result("modules.b", Outcome.FAILED), result("tags.c", Outcome.NOT_RUN))
    suites = {suite.get("name"): suite.attrib for suite in ET.fromstring(junit(made)).iter("testsuite")}
    assert suites["modules"]["tests"] == "2"
    assert suites["modules"]["failures"] == "1"
    assert suites["tags"]["errors"] == "1"
    assert [(c.group, c.passed, c.failed, c.not_run, c.seconds) for c in counts(made.checks)] == [
        ("modules", 1, 1, 0, 1.0),
        ("tags", 0, 0, 1, 0.5),
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"passed": False}, "verdict does not follow"),
        ({"digest": "latest"}, "not a verification record"),
        ({"checks": [{"id": "x"}]}, "not a verification record"),
        ({"extra": 1}, "not a verification record"),
        ({"tools": {"python": "3"}}, "not a verification record"),
        ({"tools": {"harness": "x", "checks": ""}}, "made by no version"),
        ({"checks": []}, "verdict does not follow"),
    ],
)
def test_a_record_that_was_tampered_with_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    document = json.loads(json.dumps(record(result("a.b")).to_json()))
    assert Record.from_json(document).passed
    (tmp_path / "record.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(VerificationError, match=says):
        Record.read(tmp_path / "record.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(VerificationError, match="record"):
        Record.read(tmp_path / "record.json")


def test_a_check_that_is_not_required_may_be_not_run_but_not_failed() -> None:
    def optional(outcome: Outcome) -> CheckResult:
        return dataclasses.replace(result("modules.bytes", outcome), required=False)

    assert record(result("a.b"), optional(Outcome.NOT_RUN)).passed
    assert not record(result("a.b"), optional(Outcome.FAILED)).passed
    assert not record(optional(Outcome.NOT_RUN)).passed, "nothing passed"
    suite = next(ET.fromstring(junit(record(result("modules.a"), optional(Outcome.NOT_RUN)))).iter("testsuite"))
    assert (suite.get("errors"), suite.get("skipped")) == ("0", "1")
    assert [child.tag for child in suite.iter("skipped")] == ["skipped"]


def loaded(*outcomes: Outcome, message: str = "") -> Record:
    """A record with checks that load modules, one for each outcome."""
    checks = [
        CheckResult("load.modules", f"module {number}", outcome, 1, 1, message, 0.5, required=False)
        for number, outcome in enumerate(outcomes)
    ]
    return record(result("modules.crcs"), *checks)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (loaded(), "none was tried"),
        (loaded(Outcome.PASSED), None),
        (loaded(Outcome.PASSED, Outcome.PASSED), None),
        (loaded(Outcome.PASSED, Outcome.NOT_RUN, message="no QEMU"), "no QEMU"),
        (loaded(Outcome.NOT_RUN, Outcome.PASSED), "load.modules[module 0]"),
        (loaded(Outcome.PASSED, Outcome.FAILED, message="refused"), "refused"),
        (record(result("loader.modules")), "none was tried"),
    ],
)
def test_modules_were_loaded_if_every_check_that_loads_them_passed(made: Record, why: str | None) -> None:
    assert verify.not_loaded(made) == why


def test_a_verification_passes_without_a_machine_to_load_modules_in() -> None:
    assert loaded(Outcome.NOT_RUN).passed
    assert not loaded(Outcome.FAILED).passed


def test_a_pass_that_found_something_else_is_no_record() -> None:
    document = json.loads(json.dumps(record(result("a.b")).to_json()))
    document["checks"][0]["found"] = 2
    with pytest.raises(VerificationError, match=r"a\.b cannot have passed"):
        Record.from_json(document)


def test_records_of_one_verdict_do_not_differ() -> None:
    one = record(result("a.b"), plan={"kernel": {"release": "6.1"}, "tags": [1]})
    other = dataclasses.replace(
        one,
        checks=(dataclasses.replace(one.checks[0], seconds=9.9),),
        repeat="another",
        tools={**one.tools, "python": "4"},
    )
    assert differences(one, other) == ()
    assert tool_differences(one, other) == (Difference("tools.python", "3", "4"),)


def test_what_differs_is_named_one_by_one() -> None:
    one = record(result("a.b"), result("c.d"), plan={"kernel": {"release": "6.1", "package": "1"}})
    other = record(
        result("a.b", Outcome.FAILED),
        result("e.f"),
        plan={"kernel": {"release": "6.1", "package": "2"}},
        digest="sha256:" + "b" * 64,
    )
    found = {difference.what: (difference.old, difference.new) for difference in differences(one, other)}
    assert found.keys() == {"digest", "plan.kernel.package", "a.b", "c.d", "e.f"}
    assert found["plan.kernel.package"] == ("1", "2")
    assert found["c.d"][1] is None
    assert found["e.f"][0] is None
    assert found["a.b"][1]["outcome"] == "failed"


def test_a_record_of_other_bytes_goes_before_a_new_one_is_made(tmp_path: Path) -> None:
    made = record(result("a.b"))
    made.write(tmp_path)
    verify._drop_stale(tmp_path, made.digest)
    assert Record.read(tmp_path / "record.json") == made
    verify._drop_stale(tmp_path, "sha256:" + "b" * 64)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "record.json").write_text("{")
    verify._drop_stale(tmp_path, made.digest)
    assert list(tmp_path.iterdir()) == []


def test_the_suites_checks_are_known_and_each_is_of_a_group() -> None:
    known = verify.known_checks()
    assert "modules.crcs" in known
    assert {name.partition(".")[0] for name in known} == set(GROUPS)


def test_failed_is_told_from_not_run() -> None:
    made = record(result("a.b", Outcome.FAILED), result("c.d", Outcome.NOT_RUN))
    with pytest.raises(VerificationError, match=r"1 of 2 checks failed, 1 were not run.*got a\.b"):
        verify._judge(made)
    with pytest.raises(InfrastructureError, match=r"1 of 1 checks were not run, which is not a pass"):
        verify._judge(record(result("c.d", Outcome.NOT_RUN)))
    verify._judge(record(result("c.d")))


def test_the_suites_refuse_to_run_by_themselves() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(verify.SUITES)],
        cwd=verify.PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert "nox -s verify" in done.stderr


def test_what_would_change_pytest_does_not_reach_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    monkeypatch.setenv("PYTEST_PLUGINS", "mine")
    assert {name for name in verify._environment(None) if name.startswith("PYTEST")} == {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD"
    }


def test_a_check_has_name_and_group() -> None:
    check = dataclasses.replace(result("modules.vermagic"), object="open/nvidia.ko")
    assert (check.group, check.name) == ("modules", "modules.vermagic[open/nvidia.ko]")
    assert result("config.os").name == "config.os"
