"""Modules with their parameters, device nodes, and the services that the hardware needs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from builds.recipes import INSTALLER

from .installer_node import (
    GPU_A100,
    GPU_BLACKWELL,
    LOADING,
    SERVING,
    SWITCH,
    UNDOING,
    Node,
    one_error,
    refused,
    shell,
    stop,
    until_ready,
    wait_for,
)

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
    assert "there are NVSwitches, but no GPUs and no fabric manager" in until_ready(process)
    assert node.calls() == [call.replace(" -c 255 -c 0", " -c 255") for call in LOADING] + SERVING[2:]
    assert stop(process)[::2] == (0, "")
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
    ("module", "said", "advice"),
    [
        (
            "nvidia-peermem",
            "insmod: ERROR: could not insert module x.ko: Invalid parameters",
            "no peer-memory interface",
        ),
        ("nvidia-uvm", "insmod: ERROR: could not insert module x.ko: Invalid parameters", "dmesg"),
        ("nvidia", "insmod: ERROR: could not insert module x.ko: No such device", "GPU"),
        ("nvidia", "insmod: ERROR: could not insert module x.ko: Invalid module format", "this build of the kernel"),
        ("nvidia", "insmod: ERROR: could not insert module x.ko: Exec format error", "this build of the kernel"),
        ("nvidia", "insmod: ERROR: could not insert module x.ko: Key was rejected by service", "Secure Boot"),
        ("nvidia", "insmod: ERROR: could not insert module x.ko: Unknown symbol in module", "dmesg"),
    ],
)
def test_what_insmod_says_is_explained(module: str, said: str, advice: str) -> None:
    assert advice in shell("insmod_advice", module, said)[1]


# Loader, IOMMU, memory management: what is set up for the hardware


def test_the_driver_root_has_a_loader_cache_before_it_is_mounted(node: Node) -> None:
    assert node.run("load").returncode == 0
    assert (node.home / "driver/etc/ld.so.cache").read_text() == "cache\n"
    assert [call.split()[0] for call in node.calls()[:4]] == ["ldconfig", "ldconfig", "findmnt", "mount"]


def test_a_loader_cache_that_was_not_written_is_an_error(node: Node) -> None:
    node.stand_in(node.folder / "bin/ldconfig", "")
    done = node.run("load")
    assert done.returncode == 1
    assert "the driver root's loader cache cannot be made" in one_error(done)
    assert node.changes() == {}


@pytest.mark.parametrize("kind", ["DMA", "DMA-FQ"])
def test_gpus_reach_memory_without_translation(node: Node, kind: str) -> None:
    setting = node.iommu(f"{kind}\n")
    done = node.run("load")
    assert (done.returncode, done.stderr) == (0, "")
    assert setting.read_text() == "identity"
    assert f"IOMMU group of 0000:00:01.0 set from {kind} to identity" in done.stdout
    assert node.run("unload").returncode == 0
    assert setting.read_text() == kind, "it comes back, after the modules are gone"


@pytest.mark.parametrize("kind", ["identity\n", "blocked\n"])
def test_other_iommu_groups_stay_as_they_are(node: Node, kind: str) -> None:
    setting = node.iommu(kind)
    sound = node.iommu("DMA\n", 2)  # the GPU's sound device
    done = node.run("load")
    assert done.returncode == 0
    assert "IOMMU" not in done.stdout + done.stderr
    assert (setting.read_text(), sound.read_text()) == (kind, "DMA\n")


def test_a_kernel_that_refuses_the_iommu_setting_is_warned_of(node: Node) -> None:
    node.iommu("DMA\n").unlink()
    (node.folder / "sys/bus/pci/devices/0000:00:01.0/iommu_group/type").symlink_to("/proc/version")  # never written
    node.stand_in(
        node.folder / "bin/cat", """case $1 in *iommu_group/type) echo DMA ;; *) exec /bin/cat "$@" ;; esac"""
    )
    done = node.run("load")
    assert done.returncode == 0
    assert re.fullmatch(r"nvidia-driver: warning: the IOMMU group of 0000:00:01.0 stays DMA, .+\n", done.stderr)


@pytest.mark.parametrize(
    ("conf", "passed"),
    [
        (None, ["uvm_disable_hmm=1"]),
        ("uvm_disable_hmm=0\n", ["uvm_disable_hmm=0"]),
        ("uvm_debug=1\n", ["uvm_disable_hmm=1", "uvm_debug=1"]),
        ("uvm_debug=1 uvm_disable_hmm=0", ["uvm_debug=1 uvm_disable_hmm=0"]),
    ],
)
def test_hmm_is_off_on_a_b200_unless_it_is_configured_otherwise(
    node: Node, conf: str | None, passed: list[str]
) -> None:
    node.data([{"devid": "0x2901", "name": "NVIDIA B200", "features": ["kernelopen"]}])  # synthetic
    node.devices(GPU_BLACKWELL)
    if conf is not None:
        node.write("drivers/nvidia-uvm.conf", conf)
    assert node.run("load").returncode == 0
    assert f"insmod SET/open/nvidia-uvm.ko {' '.join(passed)}" in node.calls()
    assert "insmod SET/open/nvidia.ko" in node.calls()


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA GB200", "NVIDIA B2000"])
def test_hmm_is_left_alone_on_other_gpus(node: Node, name: str) -> None:
    node.data([{"devid": "0x2901", "name": name, "features": ["kernelopen"]}])  # synthetic
    node.devices(GPU_BLACKWELL)
    assert node.run("load").returncode == 0
    assert "insmod SET/open/nvidia-uvm.ko" in node.calls()


# NVSwitches; fabric manager and nvlsm are stand-ins here, as the lab has none


def fabric_calls(node: Node) -> list[str]:
    return [call for call in node.calls() if call.startswith(("nv-fabricmanager", "nvlsm", "mknod"))]


def test_the_fabric_manager_runs_where_there_are_nvswitches(node: Node) -> None:
    node.fabric("nv-fabricmanager")
    node.devices(GPU_A100, SWITCH, SWITCH)
    process = node.start()
    said = until_ready(process)
    assert "the GPUs are joined" in said
    configuration = node.run_folder / "installer/fabricmanager.cfg"
    assert fabric_calls(node) == [
        "nv-fabricmanager --version",
        "nv-fabricmanager -c NODE/run/installer/fabricmanager.cfg",
    ]
    assert configuration.read_text().splitlines() == [
        "# comment",
        "LOG_LEVEL=4",
        "DAEMONIZE=0",
        "LOG_FILE_NAME=",
        f"TOPOLOGY_FILE_PATH={node.home}/driver/usr/share/nvidia/nvswitch",
    ]
    assert node.daemon_alive("nv-fabricmanager")
    status, _, err = stop(process)
    assert (status, err) == (0, "")
    assert node.changes() == {}


def test_no_fabric_manager_runs_where_there_are_no_nvswitches(node: Node) -> None:
    node.fabric("nv-fabricmanager", "nvlsm")
    node.bridge(vpd="just a network adapter")
    process = node.start()
    said = until_ready(process)
    assert "started" not in said.replace("nvidia-persistenced started", "")
    assert fabric_calls(node) == []
    assert stop(process)[::2] == (0, "")


@pytest.mark.parametrize("name", ["nv-fabricmanager", "nvlsm"])
def test_a_dead_fabric_service_ends_the_pod(node: Node, name: str) -> None:
    node.fabric("nv-fabricmanager", "nvlsm")
    node.bridge()
    process = node.start()
    until_ready(process)
    node.stop_daemon(name)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.fullmatch(rf"nvidia-driver: error: {name} has ended \(status 137\), .+: .+\n", err)
    assert node.changes() == {}


def test_nvlink_5_is_managed_by_the_port_that_leads_to_the_switches(node: Node) -> None:
    node.fabric("nv-fabricmanager", "nvlsm")
    node.bridge()
    process = node.start()
    until_ready(process)
    assert [call for call in node.calls() if "modprobe" in call][-2:] == [
        "nsenter -t 1 -m -- modprobe mlx5_ib",
        "nsenter -t 1 -m -- modprobe ib_umad",
    ]
    assert fabric_calls(node) == [
        "nv-fabricmanager --version",
        "mknod NODE/dev/infiniband/umad0 c 231 0",
        "mknod NODE/dev/infiniband/issm0 c 231 64",
        "nvlsm -F NODE/share/nvlsm/nvlsm.conf -g 0xe09d7303003f3bf8",
        "nv-fabricmanager -c NODE/run/installer/fabricmanager.cfg -g 0xe09d7303003f3bf8",
    ]
    assert (node.folder / "share/nvlsm").resolve() == node.home / "driver/usr/share/nvidia/nvlsm"
    assert stop(process)[::2] == (0, "")
    assert node.changes() == {}


def test_ports_that_may_not_manage_are_an_error(node: Node) -> None:
    node.fabric("nv-fabricmanager", "nvlsm")
    node.bridge(mask="0xa751ec48")
    done = node.run("init")
    assert done.returncode == 1
    assert "no port of 0000:0a:00.0 leads to the NVSwitches" in one_error(done)
    assert node.changes() == {}


def test_gpus_behind_nvswitches_need_the_fabric_manager(node: Node) -> None:
    node.devices(GPU_A100, SWITCH)
    assert "will run nothing without nv-fabricmanager, which this image lacks" in refused(node)
    node.devices(GPU_A100)
    node.bridge()
    assert "without nv-fabricmanager and nvlsm, which this image lacks" in refused(node)


def test_a_fabric_manager_of_another_version_is_an_error(node: Node) -> None:
    node.fabric("nv-fabricmanager")
    node.write("fabric-version", "550.163.011\n")
    node.devices(GPU_A100, SWITCH)
    done = node.run("init")
    assert done.returncode == 1
    assert (
        "nv-fabricmanager is not of the driver's version 550.163.01 (stand-in version is : 550.163.011)"
        in one_error(done)
    )
    assert node.changes() == {}


FABRIC_STATE = """\
GPU 00000000:01:00.0
    Product Name : NVIDIA H200
    Fabric
        State : {}
        Status : N/A
    Other
        State : In Progress
"""


def test_ready_waits_until_the_gpus_are_joined(node: Node) -> None:
    node.fabric("nv-fabricmanager")
    node.devices(GPU_A100, SWITCH)
    node.write("fabric-state", FABRIC_STATE.format("In Progress"))
    process = node.start()
    wait_for("nvidia-smi -q", node)
    assert node.status == "NotReady\n"
    node.write("fabric-state", FABRIC_STATE.format("Completed"))
    until_ready(process)
    assert node.status == "Ready\n"
    assert stop(process)[::2] == (0, "")


def test_a_fabric_manager_that_ends_before_the_gpus_are_joined_ends_the_pod(node: Node) -> None:
    node.fabric("nv-fabricmanager")
    node.devices(GPU_A100, SWITCH)
    node.write("fabric-state", FABRIC_STATE.format("Not Started"))
    process = node.start()
    wait_for("nvidia-smi -q", node)
    node.stop_daemon("nv-fabricmanager")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: nv-fabricmanager has ended (status 137)" in err
    assert node.changes() == {}


# gVisor


HOST = INSTALLER / "containerd-path.sh"


def on_host(root: Path, environment: str) -> subprocess.CompletedProcess[str]:
    """Run the host's part in a folder, with a stand-in for systemctl."""
    tools = root / "stand-ins"
    tools.mkdir(exist_ok=True)
    (tools / "systemctl").write_text(
        f'#!/bin/sh\necho "$*" >>{root}/asked\n[ "$1" != show ] || echo \'{environment}\'\n'
    )
    (tools / "systemctl").chmod(0o755)
    with HOST.open() as script:
        return subprocess.run(
            ["/bin/sh", "-s", "/opt/nvidia/toolkit", str(root)],
            stdin=script,
            env={"PATH": f"{tools}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )


def test_a_node_without_gvisor_is_left_alone(tmp_path: Path) -> None:
    done = on_host(tmp_path, "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stand-ins"]


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ("", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("A=1 PATH=/var/bin/containerruntimes:/bin B=2", "/var/bin/containerruntimes:/bin"),
    ],
)
def test_gvisor_finds_the_toolkit_by_containerds_path(tmp_path: Path, environment: str, path: str) -> None:
    shim = tmp_path / "var/bin/containerruntimes/containerd-shim-runsc-v1"
    shim.parent.mkdir(parents=True)
    shim.touch(0o755)
    done = on_host(tmp_path, environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "this node has gVisor" in done.stdout
    folder = tmp_path / "run/systemd/system/containerd.service.d"
    assert [one.name for one in folder.iterdir()] == ["zz-nvidia-toolkit.conf"]
    text = f"[Service]\nEnvironment=PATH={path}:/opt/nvidia/toolkit\n"
    assert (folder / "zz-nvidia-toolkit.conf").read_text() == text
    assert (tmp_path / "asked").read_text().endswith("daemon-reload\n")

    (tmp_path / "asked").unlink()
    again = on_host(tmp_path, f"PATH={path}:/opt/nvidia/toolkit")
    assert (again.returncode, again.stdout) == (0, "")
    assert "daemon-reload" not in (tmp_path / "asked").read_text(), "done once"


def test_a_host_whose_containerd_cannot_be_told_is_warned_of(node: Node) -> None:
    node.refuse("/bin/sh -s")
    process = node.start()
    until_ready(process)
    status, _, err = stop(process)
    assert status == 0
    assert "warning: containerd cannot be told where nvidia-container-cli is (nsenter: stand-in says no)" in err


def test_a_virtual_function_leads_to_no_switches(node: Node) -> None:
    node.bridge()
    node.write("sys/bus/pci/devices/0000:0a:00.0/physfn", "")
    assert node.run("load").returncode == 0
    process = node.start()
    until_ready(process)
    assert not any("mlx5" in call for call in node.calls())
    assert stop(process)[0] == 0


def test_damaged_data_are_no_obstacle_to_a_type_that_is_asked_for(node: Node) -> None:
    node.data(())
    done = node.run("load", KERNEL_MODULE_TYPE="open")
    assert done.returncode == 0
    assert re.fullmatch(r"nvidia-driver: warning: .+ cannot be read as the list of supported GPUs: .+\n", done.stderr)


def test_a_port_that_comes_late_is_waited_for(node: Node) -> None:
    node.fabric("nv-fabricmanager", "nvlsm")
    node.bridge()
    devices = node.folder / "sys/bus/pci/devices/0000:0a:00.0"
    (devices / "infiniband").rename(devices / "later")
    come = f'case "$*" in *ib_umad) (sleep 0.05; mv {devices}/later {devices}/infiniband) >/dev/null 2>&1 & ;; esac'
    node.stand_in(node.folder / "bin/nsenter", come)
    process = node.start(INSTALLER_PAUSE="0.05")
    until_ready(process)
    assert fabric_calls(node)[-1].endswith("-g 0xe09d7303003f3bf8")
    assert stop(process)[::2] == (0, "")
