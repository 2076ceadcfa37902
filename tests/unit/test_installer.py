"""The node installer, run from the source tree with stand-ins for every tool that would touch the machine.

The stand-ins write down how they were called and keep a small model of the node (modules, mounts) that the installer
reads back through a sysfs and proc of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from builds import paths
from builds.model import MODULES
from builds.recipes import INSTALLER

SCRIPT = INSTALLER / "nvidia-driver"
RELEASE = "6.1.0-50-cloud-amd64"
PACKAGE = "6.1.176-1"
VERSION = f"Linux version {RELEASE} (debian-kernel@lists.debian.org) (gcc-12) #1 SMP Debian {PACKAGE} (2026-05-01)"
SET = f"{RELEASE}-0123456789ab"
DRIVER = "550.163.01"

# Of 550.163.01's own data, shortened, but for the mark and Blackwell. The T4 is truly not in it.
RTX = {"devid": "0x1E30", "name": "Quadro RTX 6000", "features": ["runtimepm", "kernelopen"]}
A100 = {"devid": "0x20B0", "name": "NVIDIA A100-SXM4-40GB", "features": ["kernelopen"]}
V100 = {"devid": "0x1DB4", "name": "Tesla V100-PCIE-16GB", "features": ["vdpaufeaturesetI"]}
V100_LS = {"devid": "0x1DB4", "subdevid": "0x1306", "subvendorid": "0x10DE", "name": "V100-LS", "features": ["hdmi4k"]}
K80 = {"devid": "0x102D", "name": "Tesla K80", "legacybranch": "470.xx", "features": []}
MARKED_A100 = {**A100, "features": ["kernelopen", "gsp_proprietary_supported"]}
SYNTHETIC_BLACKWELL = {"devid": "0x2901", "name": "synthetic Blackwell", "features": ["kernelopen"]}
BRANCH_550 = (RTX, A100, V100, V100_LS, K80)
BRANCH_570 = (MARKED_A100, V100, V100_LS, K80, SYNTHETIC_BLACKWELL)

Device = tuple[str, str]
"""PCI class and device id."""
GPU_T4, GPU_A100, GPU_V100, GPU_K80 = (("0x030200", f"0x{i}") for i in ("1eb8", "20b0", "1db4", "102d"))
GPU_BLACKWELL, GPU_NEW, VGA_RTX = ("0x030200", "0x2901"), ("0x030200", "0xfffe"), ("0x030000", "0x1e30")
SWITCH, AUDIO = ("0x068000", "0x1af1"), ("0x040300", "0x10f8")

STAND_IN = """\
#!/bin/sh
name=${0##*/}
printf '%s\\n' "$name${*:+ $*}" >>"$NODE/calls"
[ -z "${LD_LIBRARY_PATH-}" ] || printf '%s\\n' "$name" >>"$NODE/with-libraries"
while IFS= read -r refused; do
    case "$name $*" in *"$refused"*) echo "$name: stand-in says no" >&2; exit 1 ;; esac
done <"$NODE/refused"
module() { basename "$1" .ko | tr - _; }
mounts() { cat "$NODE/mounts"; }
"""
"""Then comes what the tool does in the model of the node."""
TOOLS = {
    "id": "cat $NODE/uid",
    "uname": "cat $NODE/uname",
    "modinfo": 'cat "$3"',
    "insmod": """\
cp "$NODE/run/validations/.driver-daemons-status" "$NODE/status-while-loading"
sleep "$(cat "$NODE/slow" 2>/dev/null || echo 0)"
mkdir -p "$NODE/sys/module/$(module "$1")"
echo 0 >"$NODE/sys/module/$(module "$1")/refcnt"
""",
    "rmmod": 'rm -r "$NODE/sys/module/$1"',
    "findmnt": 'cat "$NODE/propagation"',
    "mountpoint": '[ "$(mounts)" -gt 0 ]',
    "mount": 'echo $(($(mounts) + 1)) >"$NODE/mounts"',
    "umount": 'echo $(($(mounts) - 1)) >"$NODE/mounts"',
    "nsenter": "",
}
VENDOR_TOOLS = {
    "nvidia-modprobe": "",
    "nvidia-smi": "",
    "nvidia-persistenced": """\
mkdir -p "$NODE/pids"
# Its parent reaps it at once; whoever adopts orphans here may take a second, and a zombie still counts as alive.
(sleep 60 & echo $! >"$NODE/pids/nvidia-persistenced.pid"; wait) >/dev/null 2>&1 &
until [ -s "$NODE/pids/nvidia-persistenced.pid" ]; do sleep 0.01; done
""",
}
QUIET = ("id", "uname", "mountpoint")
"""Calls that ask and change nothing: left out of what tests look at."""


class Node:
    """A node with the image's files, and how the installer runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "opt"
        self.run_folder = folder / "run"
        self.root = self.run_folder / "driver"
        self.firmware_setting = folder / "sys/module/firmware_class/parameters/path"
        for name, content in {
            "uid": "0\n",
            "uname": f"{RELEASE}\n",
            "mounts": "0\n",
            "propagation": "shared\n",
            "calls": "",
            "with-libraries": "",
            "refused": "",
            "proc/version": f"{VERSION}\n",
            "sys/module/firmware_class/parameters/path": "\n",
            "opt/installer/release.env": f"DRIVER_VERSION={DRIVER}\nTRIPLET=x86_64-linux-gnu\n",
        }.items():
            self.write(name, content)
        self.run_folder.mkdir()
        (folder / "drivers").mkdir()
        for tool, does in TOOLS.items():
            self.stand_in(folder / "bin" / tool, does)
        for tool, does in VENDOR_TOOLS.items():
            self.stand_in(self.home / "driver/usr/bin" / tool, does)
        self.modules()
        self.data(BRANCH_550)
        self.devices(GPU_A100, AUDIO)
        self.gpus(0)

    def write(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    def stand_in(self, path: Path, does: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN + does)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def modules(
        self, types: Sequence[str] = ("open", "proprietary"), drm: str = "drm,drm_kms_helper,nvidia-modeset"
    ) -> None:
        """A module set; the content of a stand-in module is what it depends on."""
        depends = {"nvidia-uvm": "nvidia", "nvidia-modeset": "video,nvidia", "nvidia-drm": drm}
        for one in types:
            for module in MODULES:
                self.write(f"opt/modules/{SET}/{one}/{module}.ko", depends.get(module, ""))
        self.write(f"opt/modules/{SET}/release", f"{RELEASE}\n")
        self.write(f"opt/modules/{SET}/package", f"{PACKAGE}\n")

    def data(self, chips: Sequence[Mapping[str, object]], indent: int | None = None) -> None:
        text = json.dumps({"chips": chips}, indent=indent)
        self.write("opt/driver/usr/share/nvidia/supported-gpus/supported-gpus.json", text)

    def devices(self, *devices: Device) -> None:
        """What is on the PCI bus, beside something of another vendor's."""
        subprocess.run(["rm", "-rf", self.folder / "sys/bus"], check=True)
        for number, (kind, device) in enumerate([GPU_V100, *devices]):
            place = f"sys/bus/pci/devices/0000:00:{number:02x}.0"
            self.write(f"{place}/vendor", "0x10de\n" if number else "0x1013\n")
            self.write(f"{place}/class", f"{kind}\n")
            self.write(f"{place}/device", f"{device}\n")

    def gpus(self, *minors: int) -> None:
        """The GPUs that the driver takes on when it is loaded."""
        subprocess.run(["rm", "-rf", self.folder / "proc/driver"], check=True)
        for minor in minors:
            text = f"Model: \t\t NVIDIA A100\nBus Location: \t 0000:00:0{minor}.0\nDevice Minor: \t {minor}\n"
            self.write(f"proc/driver/nvidia/gpus/0000:00:0{minor}.0/information", text)

    def module(self, name: str, refcnt: int = 0, holders: Sequence[str] = ()) -> None:
        self.write(f"sys/module/{name}/refcnt", f"{refcnt}\n")
        for holder in holders:
            (self.folder / f"sys/module/{name}/holders/{holder}").mkdir(parents=True)

    def refuse(self, *calls: str) -> None:
        """Let calls fail that contain one of these."""
        self.write("refused", "".join(f"{call}\n" for call in calls))

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.folder}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LD_LIBRARY_PATH": "/the/images/own",
            "NODE": str(self.folder),
            "INSTALLER_PARTS": str(INSTALLER),
            "INSTALLER_HOME": str(self.home),
            "INSTALLER_RUN": str(self.run_folder),
            "INSTALLER_SYS": str(self.folder / "sys"),
            "INSTALLER_PROC": str(self.folder / "proc"),
            "INSTALLER_PARAMETERS": str(self.folder / "drivers"),
            "INSTALLER_PIDS": str(self.folder / "pids"),
            "INSTALLER_INTERVAL": "0.05",
            **more,
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", SCRIPT, *arguments],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def start(self) -> subprocess.Popen[str]:
        """Start `init`, in a process group of its own as a container would be."""
        return subprocess.Popen(
            ["sh", SCRIPT, "init"],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def calls(self) -> list[str]:
        """What the stand-ins were asked to do, the node's folders shortened to a word."""
        lines = (self.folder / "calls").read_text().splitlines()
        shown = [line for line in lines if line.split()[0] not in QUIET]
        modules = f"{self.home}/modules/{SET}"
        return [line.replace(modules, "SET").replace(str(self.folder), "NODE") for line in shown]

    def forget(self) -> None:
        self.write("calls", "")

    @property
    def mounts(self) -> int:
        return int((self.folder / "mounts").read_text())

    @property
    def loaded(self) -> set[str]:
        return {path.name for path in (self.folder / "sys/module").iterdir() if path.name.startswith("nvidia")}

    @property
    def firmware(self) -> str:
        return self.firmware_setting.read_text().rstrip("\n\0")

    @property
    def status(self) -> str | None:
        path = self.run_folder / "validations/.driver-daemons-status"
        return path.read_text() if path.exists() else None

    @property
    def journal(self) -> str:
        path = self.run_folder / "installer/journal"
        return path.read_text() if path.exists() else ""

    def changes(self) -> dict[str, object]:
        """What is not as it was before the installer came: nothing, wherever it ended."""
        left = {"mounts": self.mounts, "loaded": self.loaded, "firmware": self.firmware, "status": self.status}
        left["journal"] = self.journal
        left["daemon"] = self.daemon_alive()
        return {what: value for what, value in left.items() if value}

    def daemon_alive(self) -> bool:
        path = self.folder / "pids/nvidia-persistenced.pid"
        if not path.exists():
            return False
        status = Path(f"/proc/{path.read_text().strip()}/stat")
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    def stop_daemon(self) -> None:
        if self.daemon_alive():
            os.kill(int((self.folder / "pids/nvidia-persistenced.pid").read_text()), signal.SIGKILL)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.stop_daemon()


def until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if "is ready" in line:
            return said
    raise AssertionError(f"never ready: {said}{process.stderr.read() if process.stderr else ''}")


def stop(process: subprocess.Popen[str], how: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def wait_for(what: str, node: Node) -> None:
    end = time.monotonic() + 20
    while not any(what in call for call in node.calls()):
        assert time.monotonic() < end, node.calls()
        time.sleep(0.01)


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error: what failed, and what to do."""
    assert re.fullmatch(r"nvidia-driver: error: .+: .+\n", done.stderr), done.stderr
    return done.stderr


def shell(function: str, *arguments: str, stdin: str = "") -> tuple[int, str]:
    """Call one of the decisions, as the script does: with `set -eu`, in a command substitution."""
    script = f'set -eu; . "{INSTALLER}/choose.sh"; x=$({function} "$@") || {{ echo "$x"; exit 1; }}; echo "$x"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *arguments], input=stdin, capture_output=True, text=True, timeout=10, check=False
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.rstrip("\n")


LOADING = [
    "findmnt --noheadings --output PROPAGATION --target NODE/run",
    "mount --rbind NODE/opt/driver NODE/run/driver",
    "modinfo -F depends SET/open/nvidia.ko",
    "insmod SET/open/nvidia.ko",
    "modinfo -F depends SET/open/nvidia-uvm.ko",
    "insmod SET/open/nvidia-uvm.ko",
    "modinfo -F depends SET/open/nvidia-modeset.ko",
    "nsenter -t 1 -m -- modprobe video",
    "insmod SET/open/nvidia-modeset.ko",
    "modinfo -F depends SET/open/nvidia-drm.ko",
    "nsenter -t 1 -m -- modprobe drm",
    "nsenter -t 1 -m -- modprobe drm_kms_helper",
    "insmod SET/open/nvidia-drm.ko",
    "nvidia-modprobe -c 255 -c 0",
    "nvidia-modprobe -u -c 0",
    "nvidia-modprobe -m",
]
SERVING = ["nvidia-persistenced --persistence-mode", "nvidia-smi"]
UNDOING = [
    "rmmod nvidia_drm",
    "rmmod nvidia_modeset",
    "rmmod nvidia_uvm",
    "rmmod nvidia",
    "umount --recursive --lazy NODE/run/driver",
]


# The command line


@pytest.mark.parametrize("arguments", [(), ("install",), ("init", "--fast"), ("load", "init"), ("unload", "")])
def test_unknown_commands_and_arguments_are_usage_errors(node: Node, arguments: tuple[str, ...]) -> None:
    done = node.run(*arguments)
    assert done.returncode == 2
    assert "see nvidia-driver --help" in one_error(done)
    assert node.calls() == []


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("init", "--help")])
def test_help_names_every_command(node: Node, arguments: tuple[str, ...]) -> None:
    done = node.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {command} " in done.stdout for command in ("init", "load", "unload"))
    assert node.calls() == []


@pytest.mark.parametrize("command", ["reload_nvidia_peermem", "probe_nvidia_peermem"])
def test_what_is_not_supported_yet_says_so(node: Node, command: str) -> None:
    done = node.run(command)
    assert done.returncode == 1
    assert f"{command} is not supported yet" in one_error(done)


def test_every_part_is_sourced_and_packed() -> None:
    """The image takes every *.sh of the folder, and the script finds its parts where the image has them."""
    text = SCRIPT.read_text()
    parts = re.search(r"for part in (.+); do", text)
    assert parts
    assert {f"{part}.sh" for part in parts[1].split()} == {path.name for path in INSTALLER.rglob("*.sh")}
    assert f"/{paths.INSTALLER}}}" in text
    assert f"HOME_FOLDER=${{INSTALLER_HOME:-/{Path(paths.INSTALLER).parent}}}" in (INSTALLER / "places.sh").read_text()
    assert os.access(SCRIPT, os.X_OK)


# init


def test_init_does_its_steps_in_order_and_undoes_them_when_told_to_stop(node: Node) -> None:
    process = node.start()
    said = until_ready(process)
    assert node.calls() == LOADING + SERVING
    assert "open modules" in said
    assert node.loaded == {"nvidia", "nvidia_uvm", "nvidia_modeset", "nvidia_drm"}
    assert node.firmware == str(node.root / "lib/firmware")
    assert (node.folder / "status-while-loading").read_text() == "NotReady\n"
    assert node.status == "Ready\n"
    assert node.daemon_alive()
    node.forget()
    status, out, err = stop(process)
    assert (status, err) == (0, "")
    assert "told to stop" in out
    assert node.calls() == UNDOING
    assert node.changes() == {}
    assert node.firmware_setting.read_bytes() == b"\0", "a write of nothing would not reach the kernel"


def test_interrupt_stops_as_well(node: Node) -> None:
    process = node.start()
    until_ready(process)
    assert stop(process, signal.SIGINT)[0] == 0
    assert node.changes() == {}


def test_only_the_vendors_tools_get_the_vendors_libraries(node: Node) -> None:
    process = node.start()
    until_ready(process)
    stop(process)
    assert set((node.folder / "with-libraries").read_text().split()) == set(VENDOR_TOOLS)


def test_told_to_stop_while_loading_undoes_what_was_done_so_far(node: Node) -> None:
    node.write("slow", "0.3")
    process = node.start()
    wait_for("insmod SET/open/nvidia-uvm.ko", node)
    status, out, err = stop(process)
    assert (status, err) == (0, "")
    assert "is ready" not in out
    assert not any("nvidia-modeset" in call for call in node.calls())
    assert node.calls()[-3:] == UNDOING[-3:]
    assert node.changes() == {}


FAILURES = {
    "findmnt": "propagation",
    "mount --rbind": "driver root cannot be mounted",
    "modinfo -F depends": "nvidia.ko cannot be read",
    "open/nvidia.ko": "nvidia.ko cannot be read",
    "insmod": "module nvidia cannot be loaded (insmod: stand-in says no)",
    "open/nvidia-uvm.ko": "nvidia-uvm.ko cannot be read",
    "open/nvidia-modeset.ko": "nvidia-modeset.ko cannot be read",
    "modprobe video": "module video, which nvidia-modeset needs",
    "modprobe drm_kms_helper": "module drm_kms_helper, which nvidia-drm needs",
    "open/nvidia-drm.ko": "nvidia-drm.ko cannot be read",
    "nvidia-modprobe -c": "nvidia-modprobe -c 255 -c 0 failed",
    "nvidia-modprobe -u": "nvidia-modprobe -u -c 0 failed",
    "nvidia-modprobe -m": "nvidia-modprobe -m failed",
    "nvidia-persistenced": "nvidia-persistenced does not start",
    "nvidia-smi": "nvidia-smi failed (nvidia-smi: stand-in says no)",
    **{f"insmod {{}}/{m}.ko": f"module {m} cannot be loaded" for m in MODULES if m != "nvidia-peermem"},
}


@pytest.mark.parametrize("step", FAILURES)
def test_any_failing_step_ends_init_and_undoes_the_steps_before_it(node: Node, step: str) -> None:
    node.refuse(step.format(f"{node.home}/modules/{SET}/open"))
    done = node.run("init")
    assert done.returncode == 1
    assert FAILURES[step] in one_error(done)
    assert "is ready" not in done.stdout
    assert node.changes() == {}
    did = node.calls()
    loaded = [re.sub(r".*/(.+)\.ko", r"\1", call).replace("-", "_") for call in did if call.startswith("insmod")]
    if loaded and did[did.index(next(c for c in did if c.startswith("insmod"))) :] and "insmod" in step:
        loaded.pop()  # this is the one that did not load
    undone = [call.split()[1] for call in did if call.startswith("rmmod")]
    assert undone == loaded[::-1]


def test_what_cannot_be_undone_is_warned_of_and_kept_in_the_journal(node: Node) -> None:
    node.refuse("nvidia-smi", "rmmod nvidia_drm")
    done = node.run("init")
    assert done.returncode == 1
    errors = done.stderr.splitlines()
    assert [line.split(":")[1] for line in errors] == [" error", " warning", " warning"]
    assert "nvidia-drm cannot be unloaded" in errors[1]
    assert "not everything could be undone: the warnings above say why" in errors[2]
    assert node.mounts == 0
    assert node.journal == "module nvidia-drm\n"
    node.refuse()
    assert node.run("unload").returncode == 0
    assert node.changes() == {}


def test_a_firmware_path_of_the_hosts_comes_back(node: Node) -> None:
    node.firmware_setting.write_text("/opt/firmware\n")
    assert node.run("load").returncode == 0
    assert node.firmware == str(node.root / "lib/firmware")
    assert node.run("unload").returncode == 0
    assert node.firmware == "/opt/firmware"


def test_no_firmware_setting_is_an_error(node: Node) -> None:
    node.firmware_setting.unlink()
    done = node.run("init")
    assert done.returncode == 1
    assert "parameters/path cannot be read" in one_error(done)
    assert (node.mounts, node.loaded, node.journal) == (0, set(), "")


def test_a_run_folder_that_the_node_does_not_share_is_refused(node: Node) -> None:
    node.write("propagation", "private\n")
    done = node.run("init")
    assert done.returncode == 1
    assert "is mounted private" in one_error(done)
    assert node.changes() == {}


def test_stale_mounts_are_unmounted_first(node: Node) -> None:
    node.write("mounts", "2\n")
    done = node.run("load")
    assert done.returncode == 0, done.stderr
    umount = "umount --recursive --lazy NODE/run/driver"
    assert node.calls()[:4] == [LOADING[0], umount, umount, LOADING[1]]
    assert node.mounts == 1


def test_a_stale_mount_that_cannot_be_unmounted_is_an_error(node: Node) -> None:
    node.write("mounts", "1\n")
    node.refuse("umount")
    done = node.run("init")
    assert done.returncode == 1
    assert "has a mount of an earlier run" in done.stderr
    assert not any(call.startswith("mount") for call in node.calls())


def test_restart_after_a_killed_container_works(node: Node) -> None:
    first = node.start()
    until_ready(first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    node.stop_daemon()
    node.write("run/validations/.driver-ctr-ready", "")
    node.forget()
    second = node.start()
    until_ready(second)
    assert node.calls() == UNDOING + LOADING + SERVING
    assert not (node.run_folder / "validations/.driver-ctr-ready").exists()
    assert stop(second)[0] == 0
    assert node.changes() == {}


def test_a_kill_between_note_and_change_leaves_nothing_that_cannot_be_undone(node: Node) -> None:
    """The journal says more than was done: modules, mount and firmware path are as they were."""
    node.write("run/installer/journal", "status \nroot \nfirmware /old\nmodule nvidia\nmodule nvidia-uvm\n")
    done = node.run("unload")
    assert (done.returncode, done.stderr) == (0, "")
    assert node.calls() == []
    assert node.changes() == {}


def test_modules_in_use_are_refused_politely(node: Node) -> None:
    process = node.start()
    until_ready(process)
    node.module("nvidia", refcnt=3, holders=["nvidia_uvm", "nvidia_modeset"])
    node.module("nvidia_uvm", refcnt=2)
    node.module("nvidia_modeset", refcnt=1, holders=["nvidia_drm"])
    node.forget()
    status, _, err = stop(process)
    assert status == 1
    assert err == (
        "nvidia-driver: error: not everything could be undone, in use are nvidia-uvm nvidia: "
        "end the pods that use the GPUs, then delete this pod\n"
    )
    assert node.calls() == UNDOING[-1:], "no module is unloaded, half a driver serves nobody"
    assert (node.mounts, node.firmware, node.status) == (0, "", None)

    again = node.run("init")
    assert again.returncode == 1
    assert "in use are nvidia-uvm nvidia" in one_error(again)

    node.module("nvidia", refcnt=2)
    node.module("nvidia_uvm", refcnt=0)
    assert node.run("unload").returncode == 0
    assert node.changes() == {}


def test_load_and_unload_do_their_part_and_exit(node: Node) -> None:
    done = node.run("load")
    assert (done.returncode, done.stderr) == (0, "")
    assert node.calls() == LOADING
    assert node.status == "Ready\n"
    node.forget()
    done = node.run("unload")
    assert (done.returncode, done.stderr) == (0, "")
    assert node.calls() == UNDOING
    assert node.changes() == {}
    node.forget()
    assert node.run("unload").returncode == 0, "nothing to do is no error"
    assert node.calls() == []


def test_a_second_installer_on_the_node_is_refused(node: Node) -> None:
    process = node.start()
    until_ready(process)
    for command in ("init", "unload"):
        done = node.run(command)
        assert done.returncode == 1
        assert "another nvidia-driver is at work" in one_error(done)
    assert node.mounts == 1
    assert stop(process)[0] == 0


# What must be right before anything is changed


def refused(node: Node, **environment: str) -> str:
    """The error of an `init` that must not have changed a thing."""
    done = node.run("init", **environment)
    assert done.returncode == 1
    assert node.calls() == []
    assert not (node.run_folder / "validations").exists()
    return one_error(done)


def test_root_is_required(node: Node) -> None:
    node.write("uid", "1000\n")
    assert "not running as root" in refused(node)


def test_the_shared_run_folder_is_required(node: Node) -> None:
    node.run_folder.rmdir()
    assert "run is not there or not writable" in refused(node)


def test_tools_of_the_image_are_required(node: Node, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for tool in ("sh", "cat", "id", "awk"):
        (few / tool).symlink_to(f"{tmp_path}/bin/id" if tool == "id" else f"/usr/bin/{tool}")
    assert "this image has no findmnt" in refused(node, PATH=str(few))


def test_facts_of_the_image_are_required(node: Node) -> None:
    (node.home / "installer/release.env").unlink()
    assert "release.env" in refused(node)


@pytest.mark.parametrize("part", ["steps", "places"])
def test_parts_of_the_installer_are_required(node: Node, tmp_path: Path, part: str) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for path in INSTALLER.glob("*.sh"):
        if path.stem != part:
            (parts / path.name).symlink_to(path)
    assert f"{part}.sh" in refused(node, INSTALLER_PARTS=str(parts))


def test_modules_of_the_host_are_refused(node: Node) -> None:
    node.module("nvidia")
    node.module("nvidia_uvm")
    error = refused(node)
    assert "the host has loaded nvidia nvidia-uvm" in error
    assert "driver.enabled" in error


OTHER_SET = {"release": "6.12.44-cloud-amd64\n", "package": "6.12.44-1\n"}


@pytest.mark.parametrize(
    ("release", "version", "answer"),
    [
        (RELEASE, VERSION, SET),
        ("6.12.44-cloud-amd64", "Linux version x #1 SMP Debian 6.12.44-1", "other"),
        (RELEASE, VERSION.replace(PACKAGE, "6.1.176-2"), None),
        (RELEASE, VERSION.replace(PACKAGE, f"{PACKAGE}+gl1"), None),
        (RELEASE, VERSION.replace(PACKAGE, f"2:{PACKAGE}"), None),
        ("6.1.0-51-cloud-amd64", VERSION, None),
        ("6.12.44-cloud-amd64", VERSION, None),
    ],
)
def test_the_set_is_chosen_by_the_build_of_the_running_kernel(
    node: Node, release: str, version: str, answer: str | None
) -> None:
    for name, line in OTHER_SET.items():
        node.write(f"opt/modules/other/{name}", line)
    (node.home / "modules/unfinished").mkdir()
    status, said = shell("choose_set", str(node.home / "modules"), release, version)
    if answer:
        assert (status, said) == (0, f"{node.home}/modules/{answer}")
    else:
        assert status == 1
        assert said.startswith("no modules for")
        assert said.endswith(f"has modules for {RELEASE} ({PACKAGE}), 6.12.44-cloud-amd64 (6.12.44-1)")
        assert release in said


def test_no_modules_for_the_kernel_ends_init(node: Node) -> None:
    node.write("uname", "6.6.6-other\n")
    error = refused(node)
    assert "no modules for kernel 6.6.6-other: use an image made for it" in error
    assert f"{RELEASE} ({PACKAGE})" in error
    subprocess.run(["rm", "-r", node.home / "modules"], check=True)
    assert "no kernel at all" in refused(node)


# The module type

SETTINGS = [
    ("", "", "auto"),
    ("auto", "", "auto"),
    ("open", "", "open"),
    ("proprietary", "", "proprietary"),
    ("", "true", "open"),
    ("", "false", "proprietary"),
    ("proprietary", "true", "proprietary"),
    ("auto", "true", "auto"),
    ("Open", "", None),
    ("closed", "true", None),
    ("auto open", "", None),
    ("", "yes", None),
]


@pytest.mark.parametrize(("wanted", "older", "answer"), SETTINGS)
def test_requested_type(wanted: str, older: str, answer: str | None) -> None:
    status, said = shell("requested_type", wanted, older)
    if answer:
        assert (status, said) == (0, answer)
    else:
        assert status == 1
        assert re.fullmatch(r"(KERNEL_MODULE_TYPE|OPEN_KERNEL_MODULES_ENABLED) is '.+': set it to .+", said)


@pytest.mark.parametrize(
    ("driver", "chips", "devices", "answer"),
    [
        ("550", BRANCH_550, [GPU_A100], "open"),
        ("550", BRANCH_550, [VGA_RTX, AUDIO], "open"),
        ("550", BRANCH_550, [GPU_A100, VGA_RTX, SWITCH], "open"),
        ("550", BRANCH_550, [GPU_V100], "proprietary"),
        ("550", BRANCH_550, [GPU_A100, GPU_V100], "proprietary"),
        ("550", BRANCH_550, [GPU_K80], "proprietary"),
        ("550", BRANCH_550, [GPU_T4], "proprietary"),
        ("550", BRANCH_550, [GPU_A100, GPU_NEW], "proprietary"),
        ("560", BRANCH_550, [GPU_NEW, GPU_T4], "open"),
        ("560", BRANCH_550, [GPU_NEW, GPU_V100], "proprietary"),
        ("550", BRANCH_550, [SWITCH], "open"),
        ("550", BRANCH_550, [AUDIO], "no NVIDIA GPU or NVSwitch"),
        ("550", BRANCH_550, [], "no NVIDIA GPU or NVSwitch"),
        ("570", BRANCH_570, [GPU_A100], "open"),
        ("570", BRANCH_570, [GPU_BLACKWELL], "open"),
        ("550", BRANCH_570, [GPU_BLACKWELL, GPU_NEW], "open"),
        ("570", BRANCH_570, [GPU_A100, GPU_V100], "proprietary"),
        ("570", BRANCH_570, [GPU_BLACKWELL, GPU_V100], "10de:2901 synthetic Blackwell and proprietary by 10de:1db4"),
        ("550", (), [GPU_A100], "cannot be read"),
        ("550", (), [SWITCH], "open"),
    ],
)
def test_auto(
    node: Node, driver: str, chips: Sequence[Mapping[str, object]], devices: list[Device], answer: str
) -> None:
    """The decision as it is made on a node: devices in sysfs, the branch's own data, the branch."""
    node.write("opt/installer/release.env", f"DRIVER_VERSION={driver}.1.2\nTRIPLET=x86_64-linux-gnu\n")
    node.data(chips)
    node.devices(*devices)
    done = node.run("load", KERNEL_MODULE_TYPE="auto")
    if answer in ("open", "proprietary"):
        assert done.returncode == 0, done.stderr
        assert {call.split("/")[1] for call in node.calls() if call.startswith("insmod")} == {answer}
        for _, device in [one for one in devices if one not in (SWITCH, AUDIO)]:
            assert f"GPU 10de:{device[2:]} " in done.stdout
    else:
        assert done.returncode == 1
        assert answer in one_error(done)
        assert node.calls() == []


@pytest.mark.parametrize("wanted", ["open", "proprietary"])
def test_a_type_that_is_asked_for_is_taken_whatever_the_devices(node: Node, wanted: str) -> None:
    node.devices()
    assert node.run("load", KERNEL_MODULE_TYPE=wanted).returncode == 0
    assert f"insmod SET/{wanted}/nvidia.ko" in node.calls()


def test_a_type_that_a_rule_leaves_out_is_an_error_with_the_rule(node: Node) -> None:
    subprocess.run(["rm", "-r", node.home / "modules" / SET / "open"], check=True)
    node.write(f"opt/modules/{SET}/open.absent", "pci_resize_resource() takes one more argument here\n")
    error = refused(node)
    assert "no open modules for this kernel, by rule: pci_resize_resource() takes one more argument here" in error
    assert "driver.kernelModuleType to proprietary" in error
    assert node.run("load", KERNEL_MODULE_TYPE="proprietary").returncode == 0


def test_a_type_that_is_missing_without_a_rule_is_an_error(node: Node) -> None:
    subprocess.run(["rm", "-r", node.home / "modules" / SET / "open"], check=True)
    assert "no open modules for this kernel: use another" in refused(node)
    subprocess.run(["rm", "-r", node.home / "modules" / SET / "proprietary"], check=True)
    assert "this one is damaged" in refused(node)


ODD = """{"chips" : [
  {"devid":"0x1111", "name":"a \\"quoted\\" {name} [x], y: z \\\\", "features":["a" , "kernelopen"]},
  {"features":["kernelopen","gsp_proprietary_supported"],"name":"features","devid":"0x2222"},
  {"devid":"0x3333","name":"","features":[]},
  {"devid":"0x4444","name":"nested","more":{"devid":"0x9999","features":["b"]},"features":["kernelopen"],"n":1},
  {"devid":"0x5555","name":"kernelopen","features":["nokernelopen"]},
  {"devid":"0x6666","name":"one","features":["kernelopen","gsp_proprietary_supported"]},
  {"devid":"0x6666","name":"two","features":["kernelopen"],"subdevid":"0x1"}
]}"""


@pytest.mark.parametrize(
    ("device", "support"),
    [
        ("1111", "open"),
        ("2222", "both"),
        ("3333", "proprietary"),
        ("4444", "open"),
        ("5555", "proprietary"),
        ("6666", "open"),
        ("9999", "unknown"),
    ],
)
@pytest.mark.parametrize("indent", [None, 0, 4])
def test_the_data_is_read_whatever_its_layout(tmp_path: Path, device: str, support: str, indent: int | None) -> None:
    data = tmp_path / "supported-gpus.json"
    data.write_text(ODD if indent is None else json.dumps(json.loads(ODD), indent=indent or None))
    status, said = shell("gpu_support", str(data), device)
    assert (status, said.split()[:2]) == (0, [device, support])


@pytest.mark.parametrize("text", ["", "{}", "<html>not found</html>", ODD[:-40], ODD[:-3]])
def test_damaged_data_is_an_error(tmp_path: Path, text: str) -> None:
    data = tmp_path / "supported-gpus.json"
    data.write_text(text)
    status, said = shell("gpu_support", str(data), "1111")
    assert status == 1
    assert "cannot be read as the list of supported GPUs" in said
    assert shell("gpu_support", str(tmp_path / "nothing"), "1111")[0] == 1


# Modules, devices and services


def test_parameters_of_the_operator_are_passed_on(node: Node) -> None:
    node.write(
        "drivers/nvidia.conf",
        '# for all nodes\n\n  NVreg_OpenRmEnableUnsupportedGpus=1\r\nNVreg_RegistryDwords="A=0x1;B = 2"\nflag',
    )
    node.write("drivers/nvidia-uvm.conf", "uvm_disable_hmm=1\n")
    node.write("drivers/nvidia-modeset.conf", "# nothing\n")
    assert node.run("load").returncode == 0
    insmods = [call.removeprefix("insmod SET/open/") for call in node.calls() if call.startswith("insmod")]
    assert insmods == [
        'nvidia.ko NVreg_OpenRmEnableUnsupportedGpus=1 NVreg_RegistryDwords="A=0x1;B = 2" flag',
        "nvidia-uvm.ko uvm_disable_hmm=1",
        "nvidia-modeset.ko",
        "nvidia-drm.ko",
    ]


def test_a_parameter_is_one_argument_even_with_blanks_and_patterns(tmp_path: Path) -> None:
    conf = tmp_path / "nvidia.conf"
    conf.write_text('a="x  y"\nb=*\n#c=1\n')
    assert shell("parameters_of", str(conf)) == (0, 'a="x  y"\nb=*')
    assert shell("parameters_of", str(tmp_path / "none.conf")) == (0, "")


def test_a_file_of_parameters_that_is_none_is_an_error(node: Node) -> None:
    node.write("drivers/nvidia-uvm.conf", "uvm_disable_hmm=1\noptions nvidia-uvm a=1\n[section]\n")
    done = node.run("init")
    assert done.returncode == 1
    assert "nvidia-uvm.conf has no <parameter>=<value> in line 2 3" in one_error(done)
    assert node.changes() == {}
    (node.folder / "drivers/nvidia-uvm.conf").unlink()
    (node.folder / "drivers/nvidia-uvm.conf").mkdir()
    assert "nvidia-uvm.conf is not a file" in one_error(node.run("init"))


def test_a_kernel_without_drm_gets_no_nvidia_drm(node: Node) -> None:
    node.modules(drm="")
    done = node.run("load")
    assert done.returncode == 0
    assert "this kernel has no DRM" in done.stdout
    assert "nvidia_drm" not in node.loaded
    assert not any("modprobe drm" in call for call in node.calls())
    node.forget()
    assert node.run("unload").returncode == 0
    assert node.calls() == UNDOING[1:]


def test_every_gpu_gets_its_device_node(node: Node) -> None:
    node.gpus(0, 1, 3)
    assert node.run("load").returncode == 0
    assert "nvidia-modprobe -c 255 -c 0 -c 1 -c 3" in node.calls()


def test_without_a_gpu_nothing_is_started_for_one(node: Node) -> None:
    node.gpus()
    node.devices(SWITCH)
    process = node.start()
    until_ready(process)
    assert node.calls() == [call.replace(" -c 255 -c 0", " -c 255") for call in LOADING]
    status, _, err = stop(process)
    assert status == 0
    assert "warning: this node has NVSwitches, but this image no fabric manager yet" in err
    assert node.changes() == {}


def test_gpus_that_the_driver_does_not_take_on_end_init(node: Node) -> None:
    node.gpus()
    done = node.run("init")
    assert done.returncode == 1
    assert "the driver has taken on none of the GPUs" in one_error(done)
    assert node.changes() == {}


def test_an_image_without_the_persistence_daemon_does_without(node: Node) -> None:
    (node.home / "driver/usr/bin/nvidia-persistenced").unlink()
    process = node.start()
    until_ready(process)
    assert node.calls() == LOADING + SERVING[1:]
    assert stop(process)[0] == 0


def test_a_persistence_daemon_that_ends_is_started_again(node: Node) -> None:
    process = node.start()
    until_ready(process)
    node.forget()
    node.stop_daemon()
    wait_for("nvidia-persistenced", node)
    status, _, err = stop(process)
    assert status == 0
    assert "warning: nvidia-persistenced has ended" in err
    assert node.changes() == {}


def test_a_persistence_daemon_that_cannot_be_started_again_ends_the_pod(node: Node) -> None:
    process = node.start()
    until_ready(process)
    node.refuse("nvidia-persistenced")
    node.stop_daemon()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: nvidia-persistenced does not start" in err
    assert node.changes() == {}


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("insmod: ERROR: could not insert module x.ko: No such device", "GPU"),
        ("insmod: ERROR: could not insert module x.ko: Invalid module format", "this build of the kernel"),
        ("insmod: ERROR: could not insert module x.ko: Exec format error", "this build of the kernel"),
        ("insmod: ERROR: could not insert module x.ko: Key was rejected by service", "Secure Boot"),
        ("insmod: ERROR: could not insert module x.ko: Unknown symbol in module", "dmesg"),
    ],
)
def test_what_insmod_says_is_explained(said: str, advice: str) -> None:
    assert advice in shell("insmod_advice", said)[1]
