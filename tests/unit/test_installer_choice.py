"""The installer's decisions: module set, module type, services; by tables, and as made on a node."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from .installer_node import (
    AUDIO,
    BRANCH_550,
    BRANCH_570,
    GPU_A100,
    GPU_BLACKWELL,
    GPU_K80,
    GPU_NEW,
    GPU_T4,
    GPU_V100,
    PACKAGE,
    RELEASE,
    SET,
    SWITCH,
    VERSION,
    VGA_RTX,
    Device,
    Node,
    one_error,
    refused,
    shell,
)

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


@pytest.mark.parametrize(
    ("gpus", "switches", "bridges", "manager", "nvlsm", "answer"),
    [
        ("20b0", "0", "", "", "", ""),
        ("20b0", "0", "", "fm", "nvlsm", ""),
        ("20b0", "6", "", "fm", "", "fabricmanager"),
        ("20b0", "6", "", "fm", "nvlsm", "fabricmanager"),
        ("2901", "0", "0000:0a:00.0", "fm", "nvlsm", "nvlsm fabricmanager"),
        ("", "6", "", "fm", "", "fabricmanager"),
        ("", "6", "", "", "", ""),
        ("20b0", "1", "", "", "", None),
        ("2901", "0", "0000:0a:00.0", "fm", "", None),
        ("2901", "0", "0000:0a:00.0", "", "nvlsm", None),
    ],
)
def test_services_of_nvswitches(
    gpus: str, switches: str, bridges: str, manager: str, nvlsm: str, answer: str | None
) -> None:
    status, said = shell("choose_fabric", gpus, switches, bridges, manager, nvlsm)
    if answer is None:
        assert status == 1
        assert re.fullmatch(
            r"the GPUs are joined by NVSwitches and will run nothing without (nv-\w+|nvlsm), .+: .+", said
        )
    else:
        assert (status, said) == (0, answer)


@pytest.mark.parametrize(
    ("ports", "answer"),
    [
        ({}, ""),
        ({"1": ("0xa751e848", "fe80:0000:0000:0000:e09d:7303:003f:3bf8")}, "0xe09d7303003f3bf8"),
        ({"1": ("0x00000400", "fe80:0000:0000:0000:0000:0000:0000:0001")}, ""),
        (
            {
                "1": ("0xa751ec48", "fe80:0000:0000:0000:0000:0000:0000:0001"),
                "2": ("0xa751e848", "fe80:0000:0000:0000:0000:0000:0000:0002"),
            },
            "0x0000000000000002",
        ),
        ({"1": ("0x0", "odd")}, ""),
    ],
)
def test_port_of_a_subnet_manager(tmp_path: Path, ports: Mapping[str, tuple[str, str]], answer: str) -> None:
    for number, (mask, gid) in ports.items():
        (tmp_path / f"ports/{number}/gids").mkdir(parents=True)
        (tmp_path / f"ports/{number}/cap_mask").write_text(f"{mask}\n")
        (tmp_path / f"ports/{number}/gids/0").write_text(f"{gid}\n")
    assert shell("port_of", str(tmp_path)) == (0, answer)
