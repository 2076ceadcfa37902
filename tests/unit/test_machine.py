"""The machine's command, and what is made of a QEMU that fails, hangs or is not there.

QEMU is played by a shell script under its name; processes and signals are real.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from builds import machine
from builds.errors import InfrastructureError
from builds.machine import Boot
from builds.model import Arch

NEVER = 600.0  # seconds: longer than any test
ARCH = Arch.AMD64


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on PATH; scripts in it play QEMU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def play(folder: Path, script: str, arch: Arch = ARCH) -> None:
    path = folder / machine.PROGRAMS[arch]
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def gone(pid: int) -> bool:
    """Whether a process is gone, or will be as soon as somebody asks for its status."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pid: int) -> None:
    for _ in range(3000):
        if gone(pid):
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} lives on")


@pytest.mark.parametrize(
    ("arch", "has", "lacks"),
    [
        (Arch.AMD64, ("q35", "max", "console=ttyS0 no_timer_check panic=-1 quiet"), ("cortex-a57",)),
        (Arch.ARM64, ("virt,gic-version=3", "cortex-a57", "console=ttyAMA0 panic=-1 quiet"), ("q35", "no_timer_check")),
    ],
)
def test_the_command_of_each_architecture(arch: Arch, has: tuple[str, ...], lacks: tuple[str, ...]) -> None:
    words = machine.command(arch, Boot(Path("/k,1"), Path("/i,2"), "quiet", memory=77), "/usr/bin/qemu")
    assert words[: words.index("/usr/bin/qemu")] == ("setpriv", "--pdeathsig", "KILL", "--")
    pairs = dict(pairwise(words))
    assert (pairs["-kernel"], pairs["-initrd"], pairs["-m"], pairs["-accel"]) == ("/k,1", "/i,2", "77", "tcg")
    assert "-no-reboot" in words, "a panic ends the machine"
    assert set(has) <= set(words)
    assert not [word for word in words if word in lacks or any(lack in word for lack in lacks)]


def test_a_machine_without_initrd_or_more_words_has_none() -> None:
    words = machine.command(ARCH, Boot(Path("/k")), "qemu")
    assert "-initrd" not in words
    assert words[words.index("-append") + 1] == "console=ttyS0 no_timer_check panic=-1"


def test_a_comma_in_a_drives_path_is_no_end_of_it() -> None:
    words = machine.command(ARCH, Boot(Path("/k"), drives=(Path("/a,b.img"), Path("/c.img"))), "qemu")
    drives = [after for word, after in pairwise(words) if word == "-drive"]
    assert drives == ["file=/a,,b.img,format=raw,if=none,id=drive0", "file=/c.img,format=raw,if=none,id=drive1"]
    assert [word for word in words if word.startswith("nvme,")] == [
        "nvme,drive=drive0,serial=drive0",
        "nvme,drive=drive1,serial=drive1",
    ]


@pytest.mark.parametrize(("arch", "more"), [(Arch.AMD64, "installs it"), (Arch.ARM64, "with TARGET_ARCH=arm64")])
def test_without_qemu_setup_is_named(arch: Arch, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.program(arch) is None
    for call in (
        lambda: machine.version(arch),
        lambda: machine.run(arch, Boot(Path("/k")), tmp_path / "log", patience=NEVER),
    ):
        with pytest.raises(InfrastructureError, match=f"no {machine.PROGRAMS[arch]}") as caught:
            call()
        assert caught.value.hint
        assert "nox -s setup" in caught.value.hint
        assert more in caught.value.hint


def test_what_cannot_be_started_at_all_is_said(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(stand_in, "exit 0")
    monkeypatch.setenv("PATH", str(stand_in))  # without setpriv
    with pytest.raises(InfrastructureError, match="setpriv does not start"):
        machine.run(ARCH, Boot(Path("/k")), tmp_path / "log", patience=NEVER)


def test_the_version_is_read(stand_in: Path) -> None:
    play(stand_in, 'echo "QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7)"; echo Copyright')
    assert machine.version(ARCH) == "7.2.19"
    play(stand_in, "exit 1")
    assert machine.version(ARCH) == "unknown"


def test_what_it_says_is_kept_and_told_line_by_line(stand_in: Path, tmp_path: Path) -> None:
    play(stand_in, r'printf "one\r\ntwo \377\nthree"; echo >&2; echo four >&2')
    told: list[str] = []
    log = tmp_path / "logs" / "console.log"
    ended = machine.run(ARCH, Boot(Path("/k")), log, patience=NEVER, on_line=told.append)
    assert told == ["one", "two \ufffd", "three", "four"]
    assert ended.console.split("\n") == told
    assert log.read_text().splitlines() == told
    assert ended.in_time


def test_a_machine_that_fails_says_what_it_said(stand_in: Path, tmp_path: Path) -> None:
    play(stand_in, 'echo "qemu: cannot set up guest memory: Cannot allocate memory" >&2; exit 1')
    with pytest.raises(InfrastructureError, match="ended with status 1") as caught:
        machine.run(ARCH, Boot(Path("/k")), tmp_path / "log", patience=NEVER)
    assert caught.value.got == "qemu: cannot set up guest memory: Cannot allocate memory"
    assert "cannot set up guest memory" in (tmp_path / "log").read_text()


def test_a_machine_that_is_killed_is_an_error(stand_in: Path, tmp_path: Path) -> None:
    play(stand_in, "echo begun; kill -9 $$")
    with pytest.raises(InfrastructureError, match="ended with status -9"):
        machine.run(ARCH, Boot(Path("/k")), tmp_path / "log", patience=NEVER)


def test_patience_ends_and_what_was_said_until_then_is_kept(stand_in: Path, tmp_path: Path) -> None:
    play(stand_in, f"echo $$; exec sleep {NEVER}")
    ended = machine.run(ARCH, Boot(Path("/k")), tmp_path / "log", patience=0.5)
    assert not ended.in_time
    assert gone(int(ended.console))
    assert (tmp_path / "log").read_text().strip() == ended.console


def test_whoever_is_told_a_line_can_end_it(stand_in: Path, tmp_path: Path) -> None:
    play(stand_in, f"echo $$; exec sleep {NEVER}")
    told: list[int] = []

    def end(line: str) -> None:
        told.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine.run(ARCH, Boot(Path("/k")), tmp_path / "log", patience=NEVER, on_line=end)
    assert gone(told[0])


def test_a_machine_dies_with_whoever_started_it(stand_in: Path, tmp_path: Path) -> None:
    play(stand_in, f"echo $$ >{tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid; exec sleep {NEVER}")
    code = (
        "from pathlib import Path; from builds import machine; from builds.model import Arch\n"
        f"machine.run(Arch.AMD64, machine.Boot(Path('/k')), Path({str(tmp_path / 'log')!r}), patience={NEVER})"
    )
    root = Path(machine.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as parent:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
        assert not gone(pid)
        parent.kill()
    wait_until_gone(pid)
