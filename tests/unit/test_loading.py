"""What a virtual machine's guest is told and how its answers are read; no machine is run here."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builds import kmod, loading
from builds.errors import InfrastructureError
from builds.loading import LOADED, PEERMEM, REFUSALS, SPOILED, Answer, Control, Session, Step
from builds.model import MODULES, ModuleType

from . import test_kmod

VERMAGIC = "vermagic=6.1.0-50-cloud-amd64 SMP preempt mod_unload modversions "
CRCS = {"kfree": 0x10, "module_layout": 0x20, "vfree": 0x30}
STEPS = (Step("kernel", "read", "/proc/version"), Step("a", "load", "/a.ko"), Step("b", "load", "/b.ko"))


# --- answers


def test_an_answer_has_what_was_said_before_its_status() -> None:
    said = """\
SeaBIOS (version 1.16.2)
@@ boot kernel Linux version 6.1.0
@@ kernel text Linux version 6.1.0
@@ kernel status 0
@@ a kernel a: version magic '5' should be '6'
@@ a kernel
@@ a kernel second line
@@ a status 8
[    1.5] unrelated
@@ b status 12345
@@ end
"""
    answers = loading.read(said, STEPS)
    assert list(answers) == ["kernel", "a", "b"]
    assert answers["kernel"] == Answer(0, (), ("Linux version 6.1.0",))
    assert answers["a"] == Answer(errno.ENOEXEC, ("a: version magic '5' should be '6'", "second line"), ())
    assert [one.error for one in answers.values()] == ["", "ENOEXEC", "12345"]


def test_where_the_kernel_ends_the_answers_end() -> None:
    said = "@@ kernel status 0\n@@ a kernel about to jump\n[    2.1] Kernel panic - not syncing: Fatal exception\n"
    assert list(loading.read(said, STEPS)) == ["kernel"]
    for cut in range(len("@@ a status ") + 1):
        assert list(loading.read("@@ kernel status 0\n" + "@@ a status 0"[:cut], STEPS)) == ["kernel"]


@pytest.mark.parametrize(
    "line",
    [
        "[    2.345678] @@ a status 0",  # what the kernel itself prints begins with the time
        " @@ a status 0",
        "@@ a text x\v@@ a status 0",
        "@@ a text x\f@@ a status 0",
        "@@ a text x\x85@@ a status 0",
        "@@ a text x\u2028@@ a status 0",
        "@@ a text x\r@@ a status 0",
        "@@ a text @@ a status 0",
        "@@ a kernel @@ a status 0",
        "@@ a kernel \\x0a@@ a status 0",
        "@@ a status",
        "@@ a status ",
        "@@ a status 0 ",
        "@@ a status -1",
        "@@ a status 0[    2.3] Kernel panic",
        "@@ a status \u0660",
        "@@ a status \u00b2",
        "@@  status 0",
        "@@ status 0",
        "@@",
    ],
)
def test_nothing_but_the_guests_own_whole_line_is_an_answer(line: str) -> None:
    try:
        answers = loading.read(f"@@ kernel status 0\n{line}\n", STEPS)
    except InfrastructureError:
        return
    assert list(answers) == ["kernel"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("@@ a status 0\n", "answers a instead of kernel"),
        ("@@ kernel status 0\n@@ b status 0\n", "answers b instead of a"),
        ("@@ kernel status 0\n@@ kernel status 0\n", "answers kernel instead of a"),
        ("@@ kernel status 0\n@@ a status 0\n@@ a status 8\n", "answers a instead of b"),
        ("@@ kernel status 0\n@@ a status 0\n@@ b status 0\n@@ c status 0\n", "answers c"),
    ],
)
def test_answers_that_were_not_asked_for_are_no_verdict(said: str, why: str) -> None:
    with pytest.raises(InfrastructureError, match=why):
        loading.read(said, STEPS)


@given(st.text(alphabet=st.sampled_from("@ ab\n\r\v\x1c\x85\u2028status0123kernl[]")))
def test_no_console_breaks_the_reader(console: str) -> None:
    try:
        answers = loading.read(console, STEPS)
    except InfrastructureError:
        return
    assert list(answers) == [step.id for step in STEPS][: len(answers)]


def test_without_an_answer_nothing_is_said_of_the_modules() -> None:
    assert loading.read("", STEPS) == {}
    assert loading.read("no bootable device\n", STEPS) == {}


# --- controls


def versioned(**more: bytes) -> bytes:
    return test_kmod.module(info=["license=GPL", VERMAGIC], versions=CRCS, more=more)


def extended() -> bytes:
    """As kernels from 6.14 on have it."""
    names = b"\0".join(name.encode() for name in CRCS) + b"\0"
    more = {"__version_ext_crcs": struct.pack("<3I", *CRCS.values()), "__version_ext_names": names}
    return test_kmod.module(info=["license=GPL", VERMAGIC], more=more)


@pytest.mark.parametrize("data", [versioned(), extended()], ids=["__versions", "__version_ext_crcs"])
def test_each_control_is_wrong_in_one_way(data: bytes) -> None:
    made = loading.controls(data, modversions=True)
    assert made.keys() == set(Control) == set(REFUSALS)
    sound = kmod.read_module("m.ko", data)
    read = {
        control: kmod.read_module("m.ko", spoiled)
        for control, spoiled in made.items()
        if control is not Control.TRUNCATED
    }
    flags = read[Control.FLAGS]
    assert flags.one("vermagic") == VERMAGIC.removeprefix("vermagic=").replace("mod_unload", "lod_unload")
    assert flags.versions == CRCS
    crc = read[Control.CRC]
    assert crc.info == sound.info
    assert {name for name in CRCS if crc.versions[name] != CRCS[name]} == {"kfree"}
    other = read[Control.OTHER_KERNEL]
    assert other.one("vermagic") == "7" + VERMAGIC.removeprefix("vermagic=6")
    assert all(other.versions[name] != CRCS[name] for name in CRCS)
    assert made[Control.TRUNCATED] == data[: len(data) // 2]


def test_the_crc_of_the_kernels_own_layout_is_not_the_one_that_is_flipped() -> None:
    data = test_kmod.module(info=[VERMAGIC], versions={"module_layout": 1, "vfree": 2})
    flipped = kmod.read_module("m.ko", loading.controls(data, modversions=True)[Control.CRC])
    assert flipped.versions["module_layout"] == 1
    assert flipped.versions["vfree"] != 2


def test_without_modversions_there_is_no_crc_to_flip() -> None:
    data = test_kmod.module(info=[VERMAGIC])
    made = loading.controls(data, modversions=False)
    assert made.keys() == set(Control) - {Control.CRC}
    assert kmod.read_module("m.ko", made[Control.OTHER_KERNEL]).one("vermagic") == "7" + VERMAGIC[len("vermagic=6") :]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (test_kmod.module(info=[VERMAGIC]), {Control.TRUNCATED, Control.FLAGS, Control.OTHER_KERNEL}),
        (test_kmod.module(info=["vermagic=6.1.0 SMP "], versions=CRCS), {Control.TRUNCATED, Control.CRC}),
        (
            test_kmod.module(info=[VERMAGIC], versions={"module_layout": 1}),
            {Control.TRUNCATED, Control.FLAGS, Control.OTHER_KERNEL},
        ),
        (b"", {Control.TRUNCATED}),
        (b"\x7fELF", {Control.TRUNCATED}),
        (b"vermagic=", {Control.TRUNCATED}),
    ],
)
def test_what_has_nothing_to_make_wrong_gives_no_such_control(data: bytes, found: set[Control]) -> None:
    assert loading.controls(data, modversions=True).keys() == found


def headers_of(data: bytes) -> list[int]:
    """Places of an ELF file that say where everything is."""
    start = struct.unpack_from("<Q", data, 0x28)[0]
    return [*range(64), *range(start, len(data))]


@given(st.data())
def test_no_damage_breaks_the_making_of_controls(drawn: st.DataObject) -> None:
    data = bytearray(drawn.draw(st.sampled_from([versioned(), extended()])))
    for place in drawn.draw(st.lists(st.sampled_from(headers_of(bytes(data))), min_size=1, max_size=8)):
        data[place] = drawn.draw(st.integers(0, 255))
    damaged = bytes(data[: drawn.draw(st.integers(0, len(data)))])
    made = loading.controls(damaged, modversions=True)
    assert Control.TRUNCATED in made
    assert all(len(one) == len(damaged) for control, one in made.items() if control is not Control.TRUNCATED)


def test_a_section_that_lies_about_its_size_breaks_nothing() -> None:
    """pyelftools raises OverflowError for this one."""
    data = bytearray(versioned())
    start = struct.unpack_from("<Q", data, 0x28)[0]
    for number in range(1, 6):
        struct.pack_into("<Q", data, start + 64 * number + 24, 0xFFFF_FFFF_FFFF_FFF0)
    assert Control.TRUNCATED in loading.controls(bytes(data), modversions=True)


# --- the session


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    (tmp_path / "init").write_bytes(b"program")
    (tmp_path / "nvswitch.ko").write_bytes(b"module")
    return tmp_path


def test_modules_are_loaded_in_order_asked_and_unloaded_the_other_way(guest: Path) -> None:
    both = {kind: {name: f"{kind} {name}".encode() for name in MODULES} for kind in ModuleType}
    both[ModuleType.OPEN][SPOILED] = versioned()
    session = loading.session(both, guest, [("drm", b"drm"), ("video", b"video")], modversions=True)
    ids = [step.id for step in session.steps]
    assert ids[:4] == ["kernel", "nvswitch", "kernel/drm", "kernel/video"]
    half = ids[4 : 4 + 5 + len(Control) + 2 + 5]
    assert half == [
        "load/open/nvidia",
        *(f"control/{control.name}" for control in loading.controls(versioned(), modversions=True)),
        *(f"load/open/{name}" for name in MODULES[1:]),
        "version/open",
        "taint/open",
        *(f"unload/open/{name}" for name in (PEERMEM, *reversed(LOADED))),
    ]
    assert [one for one in ids if one.startswith("control/")] == [one for one in half if one.startswith("control/")]
    assert ids[4 + len(half) :] == [
        one.replace("open", "proprietary") for one in half if not one.startswith("control/")
    ]
    assert len(set(ids)) == len(ids)
    loaded = {step.argument.split(" ")[0].removeprefix("/") for step in session.steps if step.action == "load"}
    assert loaded == set(session.files) - {"init"}
    assert all(len(str(step).split(" ", 2)) == 3 and "\n" not in str(step) for step in session.steps)


def test_what_an_image_lacks_is_left_out_and_gets_no_answer(guest: Path) -> None:
    session = loading.session({ModuleType.OPEN: {"nvidia": b"x"}}, guest, [], modversions=True)
    ids = {step.id for step in session.steps}
    assert {one for one in ids if one.startswith(("load/", "control/"))} == {"load/open/nvidia"}
    assert "version/open" in ids


# --- the initial file system


def members(archive: bytes) -> Iterator[tuple[str, int, tuple[int, int], bytes]]:
    """Name, mode, device and content of each file of a cpio archive; the format is that of cpio(5), newc."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        start = at + 110 + length + -(110 + length) % 4
        if name == b"TRAILER!!!\0":
            assert start == len(archive)
            return
        yield name[:-1].decode(), mode, (fields[9], fields[10]), archive[start : start + size]
        at = start + size + -size % 4


def test_the_archive_reads_back(tmp_path: Path) -> None:
    files = {f"open/{'x' * length}.ko": bytes([length]) * length for length in range(9)} | {"init": b"program"}
    session = Session(files, STEPS)
    size = loading.write_initrd(tmp_path / "initrd", session)
    archive = (tmp_path / "initrd").read_bytes()
    assert len(archive) == size
    found = {name: (mode, device, data) for name, mode, device, data in members(archive)}
    assert {name: found[name][2] for name in files} == files
    assert all(found[name][0] == 0o100755 for name in files)
    assert found["script"][2] == b"kernel read /proc/version\na load /a.ko\nb load /b.ko\n"
    assert {name for name, (mode, _, _) in found.items() if mode == 0o040755} == {"dev", "proc", "sys", "open"}
    assert found["dev/console"][:2] == (0o020600, (5, 1))
    assert found["dev/kmsg"][:2] == (0o020600, (1, 11))
    order = list(found)
    assert order.index("open") < order.index("open/.ko"), "the kernel makes no folders by itself"
