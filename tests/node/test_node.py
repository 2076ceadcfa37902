"""The image on a node: run in a virtual machine as the GPU Operator runs it, from start to ready to gone.

One boot for all of it. What the node is told to do is in :func:`orders`; each test judges what came of some steps.
Without a GPU some things are stood in: an NVSwitch, which makes the driver stay, nvidia-smi, which the startup probe
asks, and in one pod the fabric manager. Rows are those of the operator's contract.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from builds import loading, machine, paths, pipeline
from builds.console import human_size
from builds.errors import HarnessError
from builds.loading import LOADED, SPOILED, Control
from builds.model import ModuleType
from builds.oci import Image
from builds.plan import ModuleSet
from builds.rootfs import RootFs, open_rootfs
from tests.integration.conftest import Built

from . import node, pods
from .node import Machine, Orders, Said, Step

pytestmark = [pytest.mark.engine, pytest.mark.vm]

ROOT = "/run/nvidia/driver"
FIRMWARE = f"{ROOT}/lib/firmware"
READY = "/run/nvidia/validations/.driver-ctr-ready"
STATUS = "/run/nvidia/validations/.driver-daemons-status"
TYPES = tuple(sorted(ModuleType))
OTHER_KERNEL, MISLABELLED, FABRIC = "other-kernel", "mislabelled", "fabric"
FABRIC_MANAGER = "nv-fabricmanager"

Answers = dict[str, Said]


def orders(of: ModuleSet, image: Image, files: RootFs) -> Orders:
    """What a node is told to do whose kernel has the modules of a set."""
    types = sorted(of.modules)
    # An image that has a fabric manager would start it, and there are no NVSwitches for it to find.
    stand_in = (FABRIC,) if files.resolve(f"usr/bin/{FABRIC_MANAGER}", paths.DRIVER_ROOT) else ()

    def init(pod: str, *layers: str) -> str:
        return " ".join(("init", pod, *dict.fromkeys((*stand_in, *layers))))

    steps = [Step("before", "state"), Step("onlooker", "run onlooker")]
    for kind in types:
        steps += [
            Step(f"{kind}/before", "used /run"),
            Step(f"{kind}/init", init(kind)),
            Step(f"{kind}/after", "used /run"),
            Step(f"{kind}/probe", f"probe {kind}"),
            Step(f"{kind}/state", "state"),
            Step(f"{kind}/status", f"show {STATUS}"),
            Step(f"{kind}/version", "show /proc/driver/nvidia/version"),
            Step(f"{kind}/parameters", "show /proc/driver/nvidia/params"),
            Step(f"{kind}/root", f"tree {ROOT}"),
            Step(f"{kind}/looked-at", f"inside onlooker ls {ROOT}"),
            Step(f"{kind}/firmware", "firmware"),
            Step(f"{kind}/shadowed", f"inside {kind} ls -A /lib/firmware"),
            Step(f"{kind}/stop", f"stop {kind}"),
            Step(f"{kind}/gone", "state"),
            Step(f"{kind}/looked-for", f"inside onlooker find {ROOT} -type f"),
        ]
    steps += [
        *(Step("cut/stop", "interrupt cut TERM"), Step("cut/gone", "state")),
        *(Step("cut/kill", "interrupt killed KILL --all"), Step("cut/state", "state")),
        *(Step("crash/init", init("crashed")), Step("crash/kill", "crash crashed"), Step("crash/state", "state")),
        *(Step("again/init", init("again")), Step("again/probe", "probe again"), Step("again/state", "state")),
        *(Step("use", "use"), Step("use/stop", "stop again"), Step("use/state", "state")),
        *(Step("use/init", init("early")), Step("unuse", "unuse")),
        *(Step("free/init", init("free")), Step("free/probe", "probe free")),
        *(Step("free/stop", "stop free"), Step("free/gone", "state")),
    ]
    steps += [
        *(Step(f"{FABRIC}/init", init(FABRIC, FABRIC)), Step(f"{FABRIC}/state", "state")),
        *(Step(f"{FABRIC}/lose", f"lose {FABRIC} {FABRIC_MANAGER}"), Step(f"{FABRIC}/gone", "state")),
    ]
    for pod, layers in (
        (OTHER_KERNEL, [OTHER_KERNEL]),
        (MISLABELLED, [MISLABELLED]),
        *((kind, []) for kind in of.absent),
    ):
        steps += [Step(f"{pod}/init", init(pod, *layers)), Step(f"{pod}/gone", "state")]
    for kind in types:
        steps += [
            Step(f"classic/{kind}/before", "used /run"),
            Step(f"classic/{kind}", f"classic {kind}"),
            Step(f"classic/{kind}/after", "used /run"),
            Step(f"classic/{kind}/state", "state"),
            Step(f"classic/{kind}/undo", "unclassic"),
        ]
    # What the operator's default stands for where there is an NVSwitch and no GPU, if the image has it.
    default = None if ModuleType.OPEN in of.modules else ModuleType.PROPRIETARY
    kinds = {**{str(kind): kind for kind in TYPES}, MISLABELLED: types[0]}
    drivers = ("cut", "killed", "crashed", "again", "early", "free", FABRIC, OTHER_KERNEL, MISLABELLED)
    folder = f"{paths.MODULES}/{of.id}"
    spoiled = f"{folder}/{types[0]}/{SPOILED}.ko"
    wrong = loading.controls(files.read(spoiled), modversions=of.kernel.build.modversions)
    return Orders(
        tuple(steps),
        {
            "onlooker": pods.onlooker(image, "onlooker"),
            **{name: pods.driver(image, name, kinds.get(name, default)) for name in (*TYPES, *drivers)},
        },
        {
            OTHER_KERNEL: {f"{folder}/release": b"9.9.9-cloud-amd64\n"},
            FABRIC: {
                f"{paths.DRIVER_ROOT}/usr/bin/{FABRIC_MANAGER}": (node.GUEST / FABRIC_MANAGER).read_bytes(),
                f"{paths.DRIVER_ROOT}/usr/share/nvidia/nvswitch/fabricmanager.cfg": b"DAEMONIZE=1\n",
            },
            MISLABELLED: {spoiled: wrong[Control.OTHER_KERNEL]},
        },
        {
            "user-space": [(paths.DRIVER_ROOT, ".")],
            **{str(kind): [(f"{folder}/{kind}", "lib/modules")] for kind in types},
        },
    )


@pytest.fixture(scope="module")
def of(built: Built) -> ModuleSet:
    """The modules of the cell's own release: an image may have those of other builds of the kernel as well."""
    return next(one for one in built.plan.sets if built.cell.gl in one.releases)


@pytest.fixture(scope="module")
def answers(built: Built, of: ModuleSet) -> Answers:
    """What came of each step on the node."""
    arch, log = built.cell.arch, built.out / "logs" / "node.log"
    place = pipeline.start(built.cell, {"out_dir": str(built.out.parent)}, built.report).settings.kernel_image
    try:
        prepared = loading.prepare(
            built.plan, of, built.inputs, place, engine=built.engine, cache=built.cache, report=built.report
        )
        with open_rootfs(built.image, built.cache.root / "tmp") as files:
            told = orders(of, built.image, files)
        a_node = Machine(built.image, prepared.kernel, of.kernel.build.release, prepared.guest, arch, log)
        return node.run(a_node, told, built.cache, built.report)
    except HarnessError as error:
        failure = str(error)
    pytest.fail(failure, pytrace=False)


@pytest.fixture(params=TYPES)
def kind(request: pytest.FixtureRequest, of: ModuleSet) -> ModuleType:
    """Each module type that the image has."""
    wanted: ModuleType = request.param
    if reason := of.absent.get(wanted):
        pytest.skip(f"absent by rule: {reason}")
    return wanted


def assert_nothing_left(state: Said, before: Said) -> None:
    """A node without a driver: no module, no mount, no daemon, the firmware path as it was."""
    for what in ("module", "mount", "daemon", "firmware"):
        assert state.words(what) == before.words(what), what
    assert not {STATUS, READY} & set(state.words("file"))


def assert_ready(answers: Answers, init: str, probe: str) -> None:
    assert answers[init].status == 0, str(answers[init])
    assert answers[probe].status == 0, str(answers[probe])


def the_error(said: Said) -> str:
    """The one line with which a pod says why it ends."""
    (line,) = [line for line in said.lines if "error" in line.lower()]
    return line


def test_it_gets_ready_as_the_operators_probe_sees_it(answers: Answers, kind: ModuleType) -> None:
    """Rows 5, 7, 8, 10, 11: started by name, privileged, with the operator's environment and mounts."""
    assert_ready(answers, f"{kind}/init", f"{kind}/probe")
    assert str(answers[f"{kind}/status"]) == "Ready"
    assert READY in answers[f"{kind}/state"].words("file")
    assert not answers["before"].words("file"), "it would prove nothing if all that had been there"


def test_its_modules_are_loaded_of_the_type_and_version(answers: Answers, kind: ModuleType, built: Built) -> None:
    state, version = answers[f"{kind}/state"], str(answers[f"{kind}/version"])
    loaded = {name.replace("_", "-") for name in state.words("module")}
    assert loaded in ({*LOADED}, {*LOADED} - {"nvidia-drm"}), "nvidia-drm is nothing on a kernel without DRM"
    assert built.cell.driver in version.split(), version
    assert ("Open Kernel Module" in version) == (kind is ModuleType.OPEN), version


def test_the_operators_module_parameters_are_honoured(answers: Answers, kind: ModuleType) -> None:
    """Row 13."""
    name, _, value = pods.PARAMETER.removeprefix("NVreg_").partition("=")
    assert f'{name}: "{value}"' in answers[f"{kind}/parameters"].lines


def test_the_host_sees_the_driver_root_that_is_in_the_image(answers: Answers, kind: ModuleType, built: Built) -> None:
    """Rows 11 and 14: mounted on the host, all of it, with libraries and tools where the toolkit looks."""
    seen = {}
    for line in answers[f"{kind}/root"].lines:
        what, _, rest = line.partition(" ")
        path, _, target = rest.partition(" ")
        seen[path] = (what, target)
    with open_rootfs(built.image, built.cache.root / "tmp") as files:
        base = f"{paths.DRIVER_ROOT}/"
        have = {
            found.path.removeprefix(base): ("l" if found.is_link else "d" if found.is_dir else "f", found.target)
            for found in files.below(paths.DRIVER_ROOT)
        }
        (library,) = [
            found
            for folder in ("", "usr/lib64", "lib64", *(f"{usr}lib/{built.cell.arch.triplet}" for usr in ("usr/", "")))
            if (found := files.resolve(f"{folder}/libnvidia-ml.so.1", paths.DRIVER_ROOT))
        ]
    assert have.items() <= seen.items(), "what the image has is what the host sees"
    assert set(seen) - set(have) <= {"etc", "etc/ld.so.cache"}, "made on the node is at most the loader's cache"
    assert library.is_file
    assert library.path.endswith(f"libnvidia-ml.so.{built.cell.driver}")
    assert "usr/bin/nvidia-smi" in have
    assert "dev" not in seen, "it would change where the toolkit takes device nodes from"
    assert [words.split()[0] for words in answers[f"{kind}/state"].words("mount")] == [ROOT]


def test_a_container_that_was_there_before_sees_it_come_and_go(answers: Answers, kind: ModuleType) -> None:
    """Row 11: what the container toolkit has of the node's /run/nvidia follows the driver's."""
    assert answers["onlooker"].status == 0, str(answers["onlooker"])
    assert {"lib", "usr"} <= set(answers[f"{kind}/looked-at"].lines)
    assert answers[f"{kind}/looked-for"].lines == ()


def test_the_kernel_finds_the_firmware_from_the_host(answers: Answers, kind: ModuleType, built: Built) -> None:
    """Row 12: what the operator mounts at /lib/firmware has none, and the kernel is told a place on the host."""
    assert answers[f"{kind}/shadowed"] == replace(answers[f"{kind}/shadowed"], status=0, lines=())
    assert answers[f"{kind}/state"].words("firmware") == [FIRMWARE]
    found = {line.replace("//", "/") for line in answers[f"{kind}/firmware"].lines}
    with open_rootfs(built.image, built.cache.root / "tmp") as files:
        base = paths.DRIVER_ROOT
        have = {f.path.removeprefix(base) for f in files.below(f"{base}/lib/firmware") if f.path.endswith(".bin")}
    assert found == {f"{ROOT}{path}" for path in have}
    assert any("gsp" in path for path in found)


def test_a_stopped_pod_leaves_a_node_without_a_driver(answers: Answers, kind: ModuleType) -> None:
    """Row 9, then SIGTERM: it ends by itself with 0, and everything is undone."""
    stopped = answers[f"{kind}/stop"]
    assert stopped.status == 0, str(stopped)
    assert_nothing_left(answers[f"{kind}/gone"], answers["before"])


def test_a_pod_that_is_stopped_while_it_loads_undoes_what_it_did(answers: Answers) -> None:
    assert answers["cut/stop"].status == 0, str(answers["cut/stop"])
    assert "told to stop" in str(answers["cut/stop"])
    assert_nothing_left(answers["cut/gone"], answers["before"])


def test_a_pod_that_is_killed_while_it_loads_does_not_keep_the_next_from_working(answers: Answers) -> None:
    assert answers["cut/kill"].status == 128 + 9
    assert answers["cut/state"].words("mount"), "it would prove nothing if it had tidied up"
    assert "undoing what an earlier run left" in str(answers["crash/init"])
    assert answers["crash/init"].status == 0, str(answers["crash/init"])


def test_a_killed_pod_leaves_the_driver_and_the_next_one_works(answers: Answers) -> None:
    """The mount of a container that is gone included."""
    assert answers["crash/init"].status == 0, str(answers["crash/init"])
    assert answers["crash/kill"].status == 128 + 9
    left, again = answers["crash/state"], answers["again/state"]
    assert left.words("module"), "it would prove nothing if it had tidied up"
    assert [words.split()[0] for words in left.words("mount")] == [ROOT]
    assert_ready(answers, "again/init", "again/probe")
    assert again.words("module") == left.words("module")
    assert [words.split()[0] for words in again.words("mount")] == [ROOT], "one mount, not two on each other"


def test_modules_in_use_are_left_alone_with_a_word_why(answers: Answers) -> None:
    assert answers["use"].status == 0, str(answers["use"])
    stopped, state = answers["use/stop"], answers["use/state"]
    assert stopped.status not in (0, 128 + 15)
    assert "nvidia-uvm" in the_error(stopped)
    assert state.words("module") == answers["again/state"].words("module")
    assert STATUS not in state.words("file")
    early = answers["use/init"]
    assert early.status not in (0, 128 + 15), "it cannot begin either while somebody uses what is loaded"
    assert "nvidia-uvm" in the_error(early)


def test_after_the_last_user_is_gone_the_next_pod_works(answers: Answers) -> None:
    assert answers["unuse"].status == 0, str(answers["unuse"])
    assert_ready(answers, "free/init", "free/probe")
    assert answers["free/stop"].status == 0, str(answers["free/stop"])
    assert_nothing_left(answers["free/gone"], answers["before"])


def test_a_fabric_manager_that_dies_ends_the_pod_with_the_reason(answers: Answers) -> None:
    """GPUs that NVSwitches join run nothing without it: only a pod that ends is started again."""
    assert answers[f"{FABRIC}/init"].status == 0, str(answers[f"{FABRIC}/init"])
    assert FABRIC_MANAGER[:15] in answers[f"{FABRIC}/state"].words("daemon")
    lost = answers[f"{FABRIC}/lose"]
    assert lost.status not in (0, 128 + 9, 128 + 15)
    assert f"{FABRIC_MANAGER} has ended" in the_error(lost)
    assert_nothing_left(answers[f"{FABRIC}/gone"], answers["before"])


@pytest.mark.parametrize(
    ("pod", "reason"),
    [(OTHER_KERNEL, "no modules for kernel {release}"), (MISLABELLED, "module nvidia-uvm cannot be loaded")],
)
def test_an_image_of_another_kernel_ends_the_pod_with_the_reason(
    answers: Answers, of: ModuleSet, pod: str, reason: str
) -> None:
    """Row 8. Whether the image says so itself, or its modules are wrong and nvidia.ko is loaded already."""
    said = answers[f"{pod}/init"]
    assert said.status not in (0, 128 + 15)
    assert reason.format(release=of.kernel.build.release) in the_error(said)
    assert_nothing_left(answers[f"{pod}/gone"], answers["before"])


@pytest.mark.parametrize("absent", TYPES)
def test_a_type_that_the_image_has_not_ends_the_pod_with_the_rule(
    answers: Answers, of: ModuleSet, absent: ModuleType
) -> None:
    if absent not in of.absent:
        pytest.skip("the image has it")
    said = answers[f"{absent}/init"]
    assert said.status not in (0, 128 + 15)
    assert of.absent[absent] in the_error(said)
    assert_nothing_left(answers[f"{absent}/gone"], answers["before"])


def test_the_classic_way_takes_the_nodes_memory_and_ours_does_not(
    answers: Answers, built: Built, of: ModuleSet
) -> None:
    """Bytes decide, time is told: ``-k classic -s`` prints both."""
    rows = []
    for kind in sorted(of.modules):
        ways = {"mounted": f"{kind}/init", "unpacked (classic)": f"classic/{kind}"}
        before = {"mounted": f"{kind}/before", "unpacked (classic)": f"classic/{kind}/before"}
        after = {"mounted": f"{kind}/after", "unpacked (classic)": f"classic/{kind}/after"}
        took = {way: int(str(answers[after[way]])) - int(str(answers[before[way]])) for way in ways}
        for way, step in ways.items():
            assert answers[step].status == 0, str(answers[step])
            rows.append((kind, way, f"{answers[step].seconds:.1f} s", human_size(took[way])))
        assert answers[f"classic/{kind}/state"].words("module") == answers[f"{kind}/state"].words("module")
        assert took["mounted"] < 1 << 20
        assert took["mounted"] * 100 < took["unpacked (classic)"]
    built.report.table(
        f"From start to modules loaded, {of.kernel.build.release}, QEMU {machine.version(built.cell.arch)}",
        ("modules", "driver root", "time", "node memory (tmpfs)"),
        rows,
    )
