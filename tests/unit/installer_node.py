"""A stand-in node: the installer runs on it from the source tree, with stand-ins for every tool that would touch the
machine.

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
from collections.abc import Mapping, Sequence
from pathlib import Path

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
PATH=/usr/sbin:/usr/bin:/sbin:/bin
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
    "ldconfig": '[ "$2" != -r ] || echo cache >"$3/etc/ld.so.cache"',
    "mknod": ': >"$1"',
}
SERVICE = """\
[ "$1" != --version ] || { echo "stand-in version is : $(cat "$NODE/fabric-version")"; exit; }
echo $$ >"$NODE/pids/$name"
[ "$name" != nvlsm ] || : >"$NODE/fabric/fm_sm_ipc.socket"
exec sleep 60
"""
VENDOR_TOOLS = {
    "nvidia-modprobe": "",
    "nvidia-smi": 'cat "$NODE/fabric-state" 2>/dev/null || :',
    "nvidia-persistenced": """\
# Its parent reaps it at once; whoever adopts orphans here may take a second, and a zombie still counts as alive.
(sleep 60 & echo $! >"$NODE/pids/nvidia-persistenced.pid"; wait) >/dev/null 2>&1 &
until [ -s "$NODE/pids/nvidia-persistenced.pid" ]; do sleep 0.01; done
""",
}
FABRIC_CONFIGURATION = """\
# comment
LOG_LEVEL=4
LOG_FILE_NAME=/var/log/fabricmanager.log
DAEMONIZE=1
TOPOLOGY_FILE_PATH=/usr/share/nvidia/nvswitch
"""
QUIET = ("id", "uname", "mountpoint", "cat")
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
            "fabric-version": f"{DRIVER}\n",
            "proc/version": f"{VERSION}\n",
            "sys/module/firmware_class/parameters/path": "\n",
            "opt/installer/release.env": f"DRIVER_VERSION={DRIVER}\nTRIPLET=x86_64-linux-gnu\n",
        }.items():
            self.write(name, content)
        self.run_folder.mkdir()
        for name in ("drivers", "pids"):
            (folder / name).mkdir()
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

    def fabric(self, *programs: str) -> None:
        """The programs of NVSwitches, which the lab's images lack; stand-ins."""
        for program in programs:
            self.stand_in(self.home / "driver/usr/bin" / program, SERVICE)
        self.write("opt/driver/usr/share/nvidia/nvswitch/fabricmanager.cfg", FABRIC_CONFIGURATION)
        self.write("opt/driver/usr/share/nvidia/nvlsm/nvlsm.conf", "")

    def bridge(self, address: str = "0000:0a:00.0", vpd: str = "SMDL SW_MNG", mask: str = "0xa751e848") -> None:
        """A network adapter, by its vital product data one that leads to NVSwitches of NVLink 5."""
        place = f"sys/bus/pci/devices/{address}"
        for name, content in {
            f"{place}/vendor": "0x15b3\n",
            f"{place}/class": "0x020700\n",
            f"{place}/device": "0x1021\n",
            f"{place}/vpd": f"\x82 {vpd} \x90",
            f"{place}/infiniband/mlx5_0/ports/1/cap_mask": f"{mask}\n",
            f"{place}/infiniband/mlx5_0/ports/1/gids/0": "fe80:0000:0000:0000:e09d:7303:003f:3bf8\n",
            "sys/class/infiniband_mad/umad0/dev": "231:0\n",
            "sys/class/infiniband_mad/issm0/dev": "231:64\n",
        }.items():
            self.write(name, content)

    def iommu(self, kind: str, number: int = 1) -> Path:
        """The setting of a device's IOMMU group."""
        return self.write(f"sys/bus/pci/devices/0000:00:{number:02x}.0/iommu_group/type", kind)

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
            "INSTALLER_DEVICES": str(self.folder / "dev"),
            "INSTALLER_FABRIC": str(self.folder / "fabric"),
            "INSTALLER_NETWORK": str(self.folder / "network"),
            "INSTALLER_SHARE": str(self.folder / "share"),
            "INSTALLER_INTERVAL": "0.05",
            "INSTALLER_PAUSE": "0.01",
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

    def start(self, command: str = "init", **environment: str) -> subprocess.Popen[str]:
        """Start `init`, or another, in a process group of its own as a container would be."""
        return subprocess.Popen(
            ["sh", SCRIPT, command],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # As a runtime starts it. Tests run in the background of a script have SIGINT ignored, and a shell cannot
            # trap what was ignored when it began.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
        left["services"] = [name for name in ("nv-fabricmanager", "nvlsm") if self.daemon_alive(name)]
        return {what: value for what, value in left.items() if value}

    def daemon_alive(self, name: str = "nvidia-persistenced.pid") -> bool:
        path = self.folder / "pids" / name
        if not path.exists():
            return False
        status = Path(f"/proc/{path.read_text().strip()}/stat")
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    def stop_daemon(self, name: str = "nvidia-persistenced.pid") -> None:
        if self.daemon_alive(name):
            os.kill(int((self.folder / "pids" / name).read_text()), signal.SIGKILL)


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


def refused(node: Node, **environment: str) -> str:
    """The error of an `init` that must not have changed a thing."""
    done = node.run("init", **environment)
    assert done.returncode == 1
    assert node.calls() == []
    assert not (node.run_folder / "validations").exists()
    return one_error(done)


def shell(function: str, *arguments: str, stdin: str = "") -> tuple[int, str]:
    """Call one of the decisions, as the script does: with `set -eu`, in a command substitution."""
    script = f'set -eu; . "{INSTALLER}/choose.sh"; x=$({function} "$@") || {{ echo "$x"; exit 1; }}; echo "$x"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *arguments], input=stdin, capture_output=True, text=True, timeout=10, check=False
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.rstrip("\n")


LOADING = [
    "ldconfig -X -r NODE/opt/driver /usr/lib/x86_64-linux-gnu",
    "ldconfig -X NODE/opt/driver/usr/lib/x86_64-linux-gnu",
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
SERVING = ["nvidia-persistenced --persistence-mode", "nvidia-smi", "nsenter -t 1 -m -- /bin/sh -s /opt/nvidia/toolkit"]
UNDOING = [
    "rmmod nvidia_drm",
    "rmmod nvidia_modeset",
    "rmmod nvidia_uvm",
    "rmmod nvidia",
    "umount --recursive --lazy NODE/run/driver",
]
