"""The command line: exit statuses, no traceback, help for every verb."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from builds import __main__ as cli
from builds import errors, pipeline
from builds.console import Reporter
from builds.errors import (
    BuildError,
    ConfigurationError,
    ExcludedError,
    HarnessError,
    InfrastructureError,
    VerificationError,
)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigurationError, 2), (BuildError, 3), (VerificationError, 4), (InfrastructureError, 5)],
)
def test_an_error_is_printed_and_its_kind_is_the_exit_status(
    error: type[HarnessError], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object, **_more: object) -> None:
        raise error("subject", "fact", got="this", hint="do that", repeat="nox -s x")

    monkeypatch.setattr(pipeline, "start", fail)
    assert cli.main(["build"]) == status
    said = capsys.readouterr().err
    assert "error: subject: fact, got this" in said
    assert "hint: do that" in said
    assert "repeat: nox -s x" in said


def test_words_between_colons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "nv-pci.c:100:5: error: oci:/folder:x:tag"
    Reporter().say(text)
    Reporter().fail(BuildError("compile", text))
    Reporter().table(text, (text,), [(text,)])
    assert capsys.readouterr().err.count(text) == 5


def test_an_interrupted_run_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_arguments: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "start", interrupt)
    assert cli.main(["build"]) == errors.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_a_failed_cell_does_not_keep_others_from_being_built(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def fail(cell: object, *_arguments: object) -> None:
        begun.append(cell)
        raise BuildError("cell", "is broken")

    monkeypatch.setattr(pipeline, "start", fail)
    monkeypatch.setenv("GL_VERSION", "debian12,debian13")
    monkeypatch.setenv("DRIVER_VERSION", "550.163.01")
    assert cli.main(["build"]) == 3
    assert len(begun) == 2


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["550.163.01-debian13.bpo-amd64-cloud"], 2),
        (["550.163.01-debian13.bpo-amd64-cloud", "--among-others"], 0),
        (["550.163.01-debian13.bpo-amd64-cloud", "550.163.01-debian13.bpo-arm64-cloud"], 0),
    ],
)
def test_an_excluded_cell_is_a_failure_only_where_it_is_asked_for_alone(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exclude(*_arguments: object) -> None:
        raise ExcludedError("cell", "is excluded by rules", got="open: it does not compile")

    monkeypatch.setattr(pipeline, "start", exclude)
    assert cli.main(["build", *arguments]) == status
    said = capsys.readouterr().err
    assert "is excluded by rules" in said
    assert "open: it does not compile" in said
    assert ("error: " in said) == bool(status)


def test_help_names_every_verb_and_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    verbs = re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    assert {"setup", "lab", "plan", "build-driver", "build-image", "build", "verify", "probe-package", "clean"} <= set(
        verbs
    )
    for verb in verbs:
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        assert "usage: python -m builds" in capsys.readouterr().out


def test_an_error_of_the_system_that_nobody_foresaw_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT_DIR", "/proc/nothing/can/be/here")
    assert cli.main(["build"]) == 5
    assert "error: /proc/nothing" in capsys.readouterr().err


def test_a_plan_of_a_lab_cell_without_inputs_says_how_to_make_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT_DIR", str(tmp_path / "out"))
    assert cli.main(["plan"]) == 2
    assert 'nox -s "lab(550.163.01-debian12-amd64-cloud)"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "--cell", "570.172.08-1877.3-amd64-cloud"], "--cell: is the cell of --image"),
        (["verify", "--image", ""], "--image: must name an image"),
        (
            ["verify", "550.163.01-debian12-amd64-cloud", "--image", "x", "--cell", "550.163.01-debian13-amd64-cloud"],
            "--image: is of one cell",
        ),
    ],
)
def test_verify_refuses_what_would_verify_something_else(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_fault_of_our_own_is_a_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_arguments: object, **_more: object) -> None:
        raise ZeroDivisionError("nobody thought of it")

    monkeypatch.setattr(pipeline, "start", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["build"]) == 5
    said = capsys.readouterr().err
    assert "ZeroDivisionError: nobody thought of it" in said
    assert "Traceback" not in said
    (log,) = tmp_path.glob("*.log")
    assert "Traceback" in log.read_text()
