"""The installer's steps in order, each one's failure, and the undoing: when told to stop, after a kill, by `unload`."""

from __future__ import annotations

import os
import re
import signal

import pytest

from builds.model import MODULES

from .installer_node import (
    LOADING,
    SERVING,
    SET,
    UNDOING,
    VENDOR_TOOLS,
    Node,
    one_error,
    stop,
    until_ready,
    wait_for,
)

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
    "ldconfig -X -r": "the driver root's loader cache cannot be made (ldconfig: stand-in says no)",
    "ldconfig -X {}/driver": "the container's loader cache cannot be made",
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
    **{
        f"insmod {{}}/modules/{SET}/open/{m}.ko": f"module {m} cannot be loaded"
        for m in MODULES
        if m != "nvidia-peermem"
    },
}


@pytest.mark.parametrize("step", FAILURES)
def test_any_failing_step_ends_init_and_undoes_the_steps_before_it(node: Node, step: str) -> None:
    node.refuse(step.format(node.home))
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
    assert node.calls()[:6] == [*LOADING[:3], umount, umount, LOADING[3]]
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
