"""The operator's contract, on the installer in the real image: every call of a tool traced, and each made to fail.

A good run's trace is the list of steps, so that none is forgotten that is added later. The node is one of stand-ins,
but mounts are real: see :mod:`tests.node.contract`. Which test covers which row of the contract is in :data:`ROWS`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from builds import paths, recipes
from tests.integration.conftest import Built

from . import contract
from .contract import Outcome, Pod

pytestmark = pytest.mark.engine

TESTS = Path(__file__).parents[1]
GUIDE = TESTS.parent / "helm/NODE.md"

ROWS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("tag", ("unit/test_helm.py", "unit/test_tags.py", "image/test_tags.py")),
    2: (
        "OS part of the tag, by labels",
        ("unit/test_helm.py", "unit/test_tags.py"),
    ),
    3: ("legal tag", ("unit/test_tags.py", "image/test_tags.py")),
    4: ("the tag is the only identity", ("integration/test_push.py", "unit/test_plan.py")),
    5: (
        "command and arguments",
        (
            "image/test_runtime.py::test_refuses",
            "image/test_runtime.py::test_help",
            "image/test_config.py",
            "unit/test_installer.py::test_unknown_commands_and_arguments_are_usage_errors",
        ),
    ),
    6: (
        "GPUDirect RDMA",
        (
            "node/test_contract.py::test_peermem_is_loaded_beside_the_driver",
            "node/test_contract.py::test_each_failing_step_of_peermem",
            "unit/test_installer_peermem.py",
        ),
    ),
    7: (
        "startup probe",
        (
            "node/test_contract.py::test_the_startup_probe_needs_no_environment",
            "node/test_contract.py::test_ready_is_said_last",
            "node/test_node.py::test_it_gets_ready_as_the_operators_probe_sees_it",
        ),
    ),
    8: (
        "failing is exiting",
        (
            "node/test_contract.py::test_each_failing_step_ends_init_and_leaves_nothing",
            "image/test_runtime.py::test_init",
            "node/test_node.py::test_an_image_of_another_kernel_ends_the_pod_with_the_reason",
        ),
    ),
    9: (
        "preStop",
        (
            "node/test_contract.py::test_pre_stop",
            "node/test_node.py::test_a_stopped_pod_leaves_a_node_without_a_driver",
        ),
    ),
    10: (
        "environment",
        (
            "node/test_contract.py::test_the_operators_environment",
            "unit/test_installer_choice.py::test_requested_type",
            "unit/test_installer_choice.py::test_auto",
        ),
    ),
    11: (
        "mounts",
        (
            "node/test_contract.py::test_the_driver_root_is_seen_on_both_sides",
            "unit/test_installer_init.py::test_a_run_folder_that_the_node_does_not_share_is_refused",
            "unit/test_installer_init.py::test_no_firmware_setting_is_an_error",
            "node/test_node.py::test_a_container_that_was_there_before_sees_it_come_and_go",
        ),
    ),
    12: (
        "firmware",
        (
            "node/test_contract.py::test_the_driver_root_is_seen_on_both_sides",
            "unit/test_installer_init.py::test_a_firmware_path_of_the_hosts_comes_back",
            "node/test_node.py::test_the_kernel_finds_the_firmware_from_the_host",
            "image/test_driver_root.py",
        ),
    ),
    13: (
        "module parameters",
        (
            "node/test_contract.py::test_steps_of_a_node_with_everything",
            "node/test_node.py::test_the_operators_module_parameters_are_honoured",
            "unit/test_installer_services.py::test_parameters_of_the_operator_are_passed_on",
            "unit/test_installer_services.py::test_hmm_is_off_on_a_b200_unless_it_is_configured_otherwise",
        ),
    ),
    14: (
        "what the toolkit looks for",
        (
            "image/test_driver_root.py",
            "node/test_contract.py::test_the_driver_root_is_seen_on_both_sides",
            "node/test_node.py::test_the_host_sees_the_driver_root_that_is_in_the_image",
        ),
    ),
    15: (
        "privileged; host modules are refused",
        (
            "unit/test_installer.py::test_modules_of_the_host_are_refused",
            "unit/test_installer.py::test_root_is_required",
            "node/test_contract.py::test_modules_of_the_host_are_refused",
        ),
    ),
    16: ("no GDS, no GDRCopy", ("unit/test_helm.py",)),
}
"""Rows of the operator's contract: what each is about, and the tests that cover it, below ``tests/``."""

GPU, EVERYTHING, SWITCHES, NOTHING, HOST, PEERMEM = (
    "gpu",
    "everything",
    "switches",
    "switch-only",
    "host-modules",
    "peermem",
)
"""Nodes of stand-ins."""
UNDOING = ("rmmod", "umount")
TOLERATED = "nsenter -t 1 -m -- /bin/sh -s"
"""Of this step the pods of one runtime depend only."""
RELOAD = "reload_nvidia_peermem"


@pytest.fixture(scope="module")
def pod(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A container of the cell's image, with nodes of stand-ins."""
    build = built.set.kernel.build
    version = f"Linux version {build.release} #1 SMP Debian {build.package} (2026)"
    node = contract.node(build.release, version)
    nodes = {
        GPU: node,
        EVERYTHING: {**node, **contract.BRIDGE, "with-fabric": ""},
        SWITCHES: {**node, **contract.switches(6), "with-fabric": ""},
        NOTHING: {**contract.node(build.release, version, gpu=False), **contract.switches(1)},
        HOST: {**node, "sys/module/nvidia/refcnt": "0"},
        PEERMEM: {**node, "first": "load"},
    }
    with contract.open_pod(built.engine, built.plan.names[0], nodes, tmp_path_factory.mktemp("pod")) as made:
        yield made


@pytest.fixture(scope="module")
def good(pod: Pod) -> dict[str, Outcome]:
    """Undisturbed runs, told to stop once they are ready."""
    return {
        **{node: pod.run(node) for node in (GPU, EVERYTHING, SWITCHES, NOTHING)},
        PEERMEM: pod.run(PEERMEM, RELOAD),
    }


def steps(outcome: Outcome, built: Built) -> list[str]:
    """A trace, with the module set's folder and the library folder shortened to a word."""
    modules, libraries = f"/{paths.MODULES}/{built.set.id}", f"/usr/lib/{built.cell.arch.triplet}"
    return [call.replace(modules, "SET").replace(libraries, "LIB") for call in outcome.calls]


FIRST = ["flock -n 9"]
VERSION = ["nv-fabricmanager --version"]
LOADING = [
    "ldconfig -X -r /opt/nvidia/driver LIB",
    "ldconfig -X /opt/nvidia/driverLIB",
    "findmnt --noheadings --output PROPAGATION --target /run/nvidia",
    "mount --rbind /opt/nvidia/driver /run/nvidia/driver",
    "modinfo -F depends SET/open/nvidia.ko",
    "insmod SET/open/nvidia.ko NVreg_EnableStreamMemOPs=1",
    "modinfo -F depends SET/open/nvidia-uvm.ko",
    "insmod SET/open/nvidia-uvm.ko",
    "modinfo -F depends SET/open/nvidia-modeset.ko",
    "insmod SET/open/nvidia-modeset.ko",
    "modinfo -F depends SET/open/nvidia-drm.ko",
]
NODES = ["nvidia-modprobe -c 255 -c 0", "nvidia-modprobe -u -c 0", "nvidia-modprobe -m"]
PERSISTENCE = ["nvidia-persistenced --persistence-mode"]
BRIDGE = [
    "nsenter -t 1 -m -- modprobe mlx5_ib",
    "nsenter -t 1 -m -- modprobe ib_umad",
    "mknod /dev/infiniband/umad0 c 231 0",
    "mknod /dev/infiniband/issm0 c 231 64",
    "nvlsm -F /usr/share/nvidia/nvlsm/nvlsm.conf -g 0xe09d7303003f3bf8",
]
MANAGER = "nv-fabricmanager -c /run/nvidia/installer/fabricmanager.cfg"
CHECK = ["nvidia-smi"]
FABRIC = ["nvidia-smi -q"]
LAST = [f"{TOLERATED} /opt/nvidia/toolkit"]
UNDO = ["rmmod nvidia_modeset", "rmmod nvidia_uvm", "rmmod nvidia", "umount --recursive --lazy /run/nvidia/driver"]


def ended_well(outcome: Outcome) -> None:
    assert (outcome.status, outcome.err, outcome.left) == (0, "", {}), outcome


def test_steps_of_a_node_with_a_gpu(good: dict[str, Outcome], built: Built) -> None:
    ended_well(good[GPU])
    assert steps(good[GPU], built) == FIRST + LOADING + NODES + PERSISTENCE + CHECK + LAST + UNDO


def test_steps_of_a_node_with_everything(good: dict[str, Outcome], built: Built) -> None:
    """NVLink 5, with the fabric manager and nvlsm that stand in."""
    ended_well(good[EVERYTHING])
    before = FIRST + VERSION + LOADING + NODES + PERSISTENCE
    manager = [f"{MANAGER} -g 0xe09d7303003f3bf8"]
    assert steps(good[EVERYTHING], built) == before + BRIDGE + manager + CHECK + FABRIC + LAST + UNDO


def test_steps_of_a_node_with_nvswitches(good: dict[str, Outcome], built: Built) -> None:
    ended_well(good[SWITCHES])
    before = FIRST + VERSION + LOADING + NODES + PERSISTENCE
    assert steps(good[SWITCHES], built) == [*before, MANAGER, *CHECK, *FABRIC, *LAST, *UNDO]


def test_steps_of_a_node_with_a_switch_only(good: dict[str, Outcome], built: Built) -> None:
    """Hardware that is not there costs nothing."""
    ended_well(good[NOTHING])
    nodes = ["nvidia-modprobe -c 255", *NODES[1:]]
    assert steps(good[NOTHING], built) == FIRST + LOADING + nodes + LAST + UNDO


def test_peermem_is_loaded_beside_the_driver(good: dict[str, Outcome], built: Built) -> None:
    outcome = good[PEERMEM]
    assert (outcome.status, outcome.err) == (0, "")
    assert steps(outcome, built) == [
        *FIRST,
        "modinfo -F depends SET/open/nvidia-peermem.ko",
        "insmod SET/open/nvidia-peermem.ko peerdirect_support=1",
        "rmmod nvidia_peermem",
    ]
    assert outcome.left["modules"].split() == ["nvidia", "nvidia_modeset", "nvidia_uvm"], "the driver stays"


def documented() -> list[str]:
    """The errors that the operator's guide tells of, each by a phrase of it."""
    rows = [line.split("|")[1] for line in GUIDE.read_text().splitlines() if line.startswith("| `")]
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]


def test_what_the_guide_quotes_is_said() -> None:
    """No phrase of helm/NODE.md is one that the installer does not have any more."""
    sources = " ".join(path.read_text() for path in recipes.INSTALLER_PARTS)
    assert [phrase for phrase in documented() if phrase not in sources] == []


def is_service(call: str) -> bool:
    """Whether it stays, so that its failure is noticed a moment later."""
    return call.startswith(("nvlsm ", MANAGER))


def fails_well(outcome: Outcome, call: str) -> None:
    """One line says what failed and what to do."""
    assert outcome.status == 1, call
    assert len(outcome.errors) == 1, f"{call}: {outcome.err}"
    assert re.fullmatch(r"nvidia-driver: error: .+: .+", outcome.errors[0])
    assert any(phrase in outcome.errors[0] for phrase in documented()), (
        f"helm/NODE.md does not tell of {outcome.errors[0]}"
    )
    assert outcome.ready is None or call.startswith(UNDOING), call


def test_each_failing_step_ends_init_and_leaves_nothing(pod: Pod, good: dict[str, Outcome]) -> None:
    calls = good[EVERYTHING].calls
    assert good[EVERYTHING].ready
    for at, call in enumerate(calls[: good[EVERYTHING].ready], 1):
        outcome = pod.run(EVERYTHING, act="fail", at=at)
        assert outcome.calls[:at] == calls[:at]
        if call.startswith(TOLERATED):
            assert (outcome.status, outcome.errors) == (0, [])
            assert "warning: containerd cannot be told" in outcome.err
            assert outcome.calls == calls
        else:
            fails_well(outcome, call)
            # What a service says is the container's log; what another tool says is in the error.
            said = f"{call.split()[0]}: stand-in says no"
            assert outcome.err == (f"{said}\n" if is_service(call) else "") + f"{outcome.errors[0]}\n"
            assert said in outcome.err
            following = [one for one in outcome.calls[at:] if not one.startswith(UNDOING)]
            assert following == [] or is_service(call), f"{call}: {following}"
            assert outcome.ready is None
        assert outcome.left == {}, f"{call}: {outcome.left}"
        assert outcome.iommu == "DMA"


def test_each_failing_step_of_the_undoing_is_told_and_made_up_for(pod: Pod, good: dict[str, Outcome]) -> None:
    calls, ready = good[GPU].calls, good[GPU].ready
    assert ready
    for at, call in enumerate(calls[ready:], ready + 1):
        outcome = pod.run(GPU, act="fail", at=at)
        fails_well(outcome, call)
        assert "warning: " in outcome.err
        assert "not everything could be undone: the warnings above say why" in outcome.errors[0]
        assert outcome.left["journal"]
        assert outcome.after == "", "what is left is undone by `unload`, as by the next `init`"


def test_each_failing_step_of_peermem(pod: Pod, good: dict[str, Outcome]) -> None:
    for at, call in enumerate(good[PEERMEM].calls, 1):
        outcome = pod.run(PEERMEM, RELOAD, act="fail", at=at)
        fails_well(outcome, call)
        kept = ["nvidia_peermem"] if call.startswith("rmmod") else []
        assert outcome.left["modules"].split() == ["nvidia", "nvidia_modeset", *kept, "nvidia_uvm"], call


def test_told_to_stop_at_any_step(pod: Pod, good: dict[str, Outcome]) -> None:
    for at, call in enumerate(good[EVERYTHING].calls, 1):
        outcome = pod.run(EVERYTHING, act="stop", at=at)
        assert (outcome.status, outcome.err, outcome.left) == (0, "", {}), f"{call}: {outcome}"
        assert outcome.iommu == "DMA"


def test_killed_at_any_step_the_next_init_works(pod: Pod, good: dict[str, Outcome], built: Built) -> None:
    calls = good[GPU].calls
    for at, call in enumerate(calls, 1):
        outcome = pod.run(GPU, act="kill", at=at)
        assert outcome.before == calls[:at], f"it was not killed at {call}"
        ended_well(outcome)
        undone, again = outcome.calls[: -len(calls) + 1], outcome.calls[-len(calls) + 1 :]
        assert again == calls[1:], call
        assert {one.split()[0] for one in undone} <= {"flock", *UNDOING}, f"{call}: {undone}"
        assert outcome.iommu == "DMA"


def test_modules_of_the_host_are_refused(pod: Pod) -> None:
    outcome = pod.run(HOST)
    assert (outcome.status, len(outcome.errors)) == (1, 1)
    assert "the host has loaded nvidia: " in outcome.errors[0]
    assert outcome.calls == ("flock -n 9",)


def test_ready_is_said_last(pod: Pod, good: dict[str, Outcome]) -> None:
    """No step that may fail comes after it, or the operator would take a node for ready that is not."""
    assert good[EVERYTHING].ready is not None
    assert all(call.startswith(UNDOING) for call in good[EVERYTHING].calls[good[EVERYTHING].ready :])


SEEN = """
/usr/bin/nsenter --mount=/proc/$(cat /run/pod)/ns/mnt nvidia-driver load >/dev/null
cd /run/nvidia
ls -d driver/usr/bin/nvidia-smi driver/usr/lib/*/libnvidia-ml.so.1 driver/lib/firmware/nvidia driver/dev 2>/dev/null
ldconfig -r /run/nvidia/driver -p | grep -o ' => .*libnvidia-ml.so.1$'
cat /node/sys/module/firmware_class/parameters/path; echo; cat validations/.driver-daemons-status
/usr/bin/nsenter --mount=/proc/$(cat /run/pod)/ns/mnt nvidia-driver unload >/dev/null
ls -A /run/nvidia/driver
"""


def test_the_driver_root_is_seen_on_both_sides(pod: Pod, built: Built) -> None:
    """The mount is in the host's namespace as well, with a loader cache, and is gone there after `unload`."""
    pod.run(GPU)
    said = pod.does(SEEN).split()
    library = f"usr/lib/{built.cell.arch.triplet}/libnvidia-ml.so.1"
    assert said[:3] == ["driver/lib/firmware/nvidia", "driver/usr/bin/nvidia-smi", f"driver/{library}"]
    assert said[3:] == ["=>", f"/{library}", "/run/nvidia/driver/lib/firmware", "Ready"]


def test_the_startup_probe_needs_no_environment(pod: Pod, built: Built) -> None:
    """Libraries are found with an empty environment once the driver is installed, and by the image's before."""
    pod.run(GPU)
    library = f"/{paths.DRIVER_ROOT}/usr/lib/{built.cell.arch.triplet}/libnvidia-ml.so.1"
    assert pod.does("env -i /usr/sbin/ldconfig -p | grep -o '/.*libnvidia-ml.so.1$'").strip() == library
    assert pod.does("command -v nvidia-smi").strip() == f"/{paths.DRIVER_ROOT}/usr/bin/nvidia-smi"


def test_pre_stop(pod: Pod) -> None:
    """It removes the probe's file by /bin/sh and rm."""
    said = pod.does("mkdir -p /run/nvidia/validations && touch /run/nvidia/validations/.driver-ctr-ready && echo made")
    assert said == "made\n"
    assert pod.does("/bin/sh -c 'rm -f /run/nvidia/validations/.driver-ctr-ready'; ls -A /run/nvidia/validations") == ""


def test_the_operators_environment(pod: Pod, built: Built) -> None:
    """What the operator sets is understood or of no consequence."""
    operator = {
        "NODE_NAME": "node",
        "NODE_IP": "192.0.2.1",
        "NVIDIA_VISIBLE_DEVICES": "void",
        "DRIVER_CONFIG_DIGEST": "0123",
        "GPU_DIRECT_RDMA_ENABLED": "true",
        "USE_HOST_MOFED": "false",
        "KERNEL_MODULE_TYPE": "proprietary",
        "OPEN_KERNEL_MODULES_ENABLED": "true",
    }
    outcome = pod.run(GPU, environment=operator)
    ended_well(outcome)
    assert "insmod SET/proprietary/nvidia-uvm.ko" in steps(outcome, built)


def test_each_row_of_the_contract_is_covered() -> None:
    assert sorted(ROWS) == list(range(1, 17))
    for row, (_, names) in ROWS.items():
        for name in names:
            file, _, test = name.partition("::")
            tree = ast.parse((TESTS / file).read_text())
            found = {one.name for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")}
            assert found if not test else test in found, f"row {row}: {name}"
