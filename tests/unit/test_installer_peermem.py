"""GPUDirect RDMA: a second container of the image, which loads nvidia-peermem beside the driver's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from .installer_node import UNDOING, Node, one_error, stop, until_ready, wait_for

RELOAD, PROBE = "reload_nvidia_peermem", "probe_nvidia_peermem"
INSMOD = "insmod SET/open/nvidia-peermem.ko"


@pytest.fixture
def driver(node: Node) -> Iterator[subprocess.Popen[str]]:
    """The driver's container, ready."""
    process = node.start()
    until_ready(process)
    node.forget()
    yield process
    if process.poll() is None:
        stop(process)


@pytest.fixture
def network(node: Node) -> None:
    """The network drivers' container is done."""
    node.write("network/.driver-ready", "")


def until(process: subprocess.Popen[str], what: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if what in line:
            return
    raise AssertionError(process.stderr.read() if process.stderr else "")


def loaded(process: subprocess.Popen[str]) -> None:
    until(process, "module nvidia-peermem loaded")


def test_it_is_loaded_beside_the_driver_and_unloaded_when_told_to_stop(
    node: Node, driver: subprocess.Popen[str], network: None
) -> None:
    assert node.run(PROBE).returncode == 1
    process = node.start(RELOAD, KERNEL_MODULE_TYPE="")
    loaded(process)
    assert node.calls() == ["modinfo -F depends SET/open/nvidia-peermem.ko", INSMOD]
    assert node.run(PROBE).returncode == 0
    assert stop(process)[::2] == (0, "")
    assert node.calls()[-1] == "rmmod nvidia_peermem"
    assert "nvidia_peermem" not in node.loaded
    assert {"nvidia", "nvidia_uvm"} <= node.loaded
    assert node.run(PROBE).returncode == 1


def test_it_is_of_the_type_that_the_drivers_container_chose(node: Node, network: None) -> None:
    assert node.run("load", KERNEL_MODULE_TYPE="proprietary").returncode == 0
    process = node.start(RELOAD)
    loaded(process)
    assert node.calls()[-1] == "insmod SET/proprietary/nvidia-peermem.ko"
    assert stop(process)[0] == 0


def test_parameters_and_needed_modules(node: Node, driver: subprocess.Popen[str], network: None) -> None:
    node.write(f"opt/modules/{next((node.home / 'modules').iterdir()).name}/open/nvidia-peermem.ko", "ib_core,nvidia")
    node.write("drivers/nvidia-peermem.conf", "peerdirect_support=1\n")
    process = node.start(RELOAD)
    loaded(process)
    assert node.calls()[-2:] == ["nsenter -t 1 -m -- modprobe ib_core", f"{INSMOD} peerdirect_support=1"]
    assert stop(process)[0] == 0


def test_it_waits_for_the_driver(node: Node, network: None) -> None:
    process = node.start(RELOAD)
    until(process, "waiting for the driver, which another container loads")
    assert node.calls() == []
    driver = node.start()
    until_ready(driver)
    loaded(process)
    assert stop(process)[0] == 0
    assert stop(driver)[0] == 0
    assert node.changes() == {}


def test_it_waits_for_the_network_drivers_container(node: Node, driver: subprocess.Popen[str]) -> None:
    process = node.start(RELOAD)
    until(process, "network/.driver-ready")
    node.write("network/.driver-ready", "")
    loaded(process)
    assert stop(process)[0] == 0


def test_it_waits_for_the_hosts_network_drivers(node: Node, driver: subprocess.Popen[str]) -> None:
    process = node.start(RELOAD, USE_HOST_MOFED="true")
    until(process, "the host's module ib_core")
    node.module("ib_core")
    until(process, "the host's module mlx5_core")
    node.module("mlx5_core")
    loaded(process)
    assert stop(process)[0] == 0


def test_told_to_stop_while_waiting(node: Node) -> None:
    process = node.start(RELOAD)
    until(process, "waiting for")
    assert stop(process)[::2] == (0, "")
    assert node.calls() == []


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("USE_HOST_MOFED", "yes", "USE_HOST_MOFED is 'yes': set it to true or false"),
        ("GPU_DIRECT_RDMA_ENABLED", "1", "GPU_DIRECT_RDMA_ENABLED is '1': set it to true or false"),
        ("GPU_DIRECT_RDMA_ENABLED", "false", "GPU_DIRECT_RDMA_ENABLED is false: set driver.rdma.enabled"),
    ],
)
def test_settings_that_make_no_sense(node: Node, variable: str, value: str, says: str) -> None:
    done = node.run(RELOAD, **{variable: value})
    assert done.returncode == 1
    assert says in one_error(done)


def test_a_kernel_without_peer_memory_is_said_in_one_line(
    node: Node, driver: subprocess.Popen[str], network: None
) -> None:
    node.stand_in(
        node.folder / "bin/insmod", "echo 'insmod: ERROR: could not insert: Invalid parameters' >&2; exit 1\n"
    )
    done = node.run(RELOAD)
    assert done.returncode == 1
    assert "have no peer-memory interface for these modules, so RDMA uses DMA-BUF" in one_error(done)
    assert "nvidia_peermem" not in node.loaded


@pytest.mark.parametrize("call", ["modinfo", "insmod"])
def test_failing_steps(node: Node, driver: subprocess.Popen[str], network: None, call: str) -> None:
    node.refuse(call)
    done = node.run(RELOAD)
    assert done.returncode == 1
    one_error(done)
    assert "nvidia_peermem" not in node.loaded
    assert driver.poll() is None


def test_it_ends_when_the_network_drivers_take_it_away(
    node: Node, driver: subprocess.Popen[str], network: None
) -> None:
    process = node.start(RELOAD)
    loaded(process)
    subprocess.run(["rm", "-r", node.folder / "sys/module/nvidia_peermem"], check=True)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: nvidia-peermem was unloaded, with the driver or the network drivers: " in err
    again = node.start(RELOAD)
    loaded(again)
    assert stop(again)[0] == 0


def test_one_that_a_killed_container_left_is_taken_over(
    node: Node, driver: subprocess.Popen[str], network: None
) -> None:
    node.module("nvidia_peermem")
    process = node.start(RELOAD)
    until(process, "is loaded already")
    assert stop(process)[0] == 0
    assert node.calls() == ["rmmod nvidia_peermem"]


def test_in_use_it_stays(node: Node, driver: subprocess.Popen[str], network: None) -> None:
    process = node.start(RELOAD)
    loaded(process)
    node.module("nvidia_peermem", refcnt=1)
    status, _, err = stop(process)
    assert status == 1
    assert (
        err == "nvidia-driver: error: nvidia-peermem stays loaded: end the pods that use RDMA, then delete this pod\n"
    )
    node.module("nvidia_peermem")


def test_others_in_use_do_not_keep_it(node: Node, driver: subprocess.Popen[str], network: None) -> None:
    process = node.start(RELOAD)
    loaded(process)
    node.module("nvidia", refcnt=5)
    assert stop(process)[0] == 0
    node.module("nvidia", refcnt=0)


def test_the_drivers_container_unloads_it_with_the_rest(
    node: Node, driver: subprocess.Popen[str], network: None
) -> None:
    process = node.start(RELOAD)
    loaded(process)
    node.forget()
    assert stop(driver)[::2] == (0, "")
    assert node.calls() == ["rmmod nvidia_peermem", *UNDOING]
    assert node.changes() == {}
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_a_node_needs_one_of_them(node: Node) -> None:
    process = node.start(RELOAD)
    until(process, "waiting for")
    assert "another nvidia-driver is at work" in one_error(node.run(RELOAD))
    assert stop(process)[0] == 0


@pytest.mark.parametrize("state", ["coming", "going"])
def test_the_probe_tells_a_module_that_comes_or_goes(node: Node, state: str) -> None:
    node.module("nvidia_peermem")
    node.write("sys/module/nvidia_peermem/initstate", "live\n")
    assert node.run(PROBE).returncode == 0
    node.write("sys/module/nvidia_peermem/initstate", f"{state}\n")
    done = node.run(PROBE)
    assert done.returncode == 1
    assert f"it is {state}" in one_error(done)


def test_the_probe_needs_neither_root_nor_the_lock(node: Node, driver: subprocess.Popen[str]) -> None:
    node.write("uid", "1000\n")
    node.module("nvidia_peermem")
    assert node.run(PROBE).returncode == 0
    assert node.calls() == []


def test_the_wait_is_told_once(node: Node) -> None:
    process = node.start(RELOAD)
    until(process, "waiting for")
    node.write("run/validations/.driver-daemons-status", "NotReady\n")
    out = stop(process)[1]
    assert "waiting for" not in out


def test_the_probe_during_init(node: Node) -> None:
    process = node.start()
    wait_for("nvidia-modprobe", node)
    assert node.run(PROBE).returncode == 1
    until_ready(process)
    assert stop(process)[0] == 0
