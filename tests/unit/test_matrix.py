"""The matrix files: what is in them, what is refused and how it is said, what a selection selects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from builds import matrix
from builds.errors import ConfigurationError
from builds.matrix import Lifecycle, Release
from builds.model import Cell, ModuleType

GOOD = """\
inputs: upstream
os_tag: "gardenlinux0"
alias: "gardenlinux{gl}"
base:
  amd64: "1877.3"
drivers:
  - version: "570.172.08"
  - version: "570.211.01"
  - version: "580.95.05"
releases:
  - gl: "1877.10"
    arch: [amd64]
    flavor: [cloud]
exclude:
  - driver: "==570.*"
    kernel: ">=6.18.41,<6.19"
    module_type: open
    reason: "a signature changed"
"""
RICH = (
    GOOD
    + """\
  - driver: "==580.*"
    kernel: ">=6.18.41,<6.19"
    module_type: open
    reason: "a signature changed"
gvisor:
  "570": "570.172.08"
settings:
  PACKAGE_SHA256: required
"""
).replace(
    "    arch:",
    """\
    kernel: "6.12.66-1gl0+bp1877"
    lifecycle: past
    os_tag: "gardenlinux{gl}"
    drivers: ["570.211.01", "580.95.05"]
    arch:""",
)
RICH = RICH.replace('"580.95.05"\n', '"580.95.05"\n    arch: [amd64]\n', 1)
"""A file with every key there is."""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        matrix.load(write(tmp_path, text))
    return str(caught.value)


def lines(tmp_path: Path, text: str) -> list[str]:
    """The problems alone, in the order in which they are reported."""
    return [line.strip() for line in problems(tmp_path, text).splitlines() if line.startswith("  line ")]


def test_the_files_of_the_project_are_sound_and_share_no_cell() -> None:
    cells = [cell for of in matrix.load_all() for cell in of.cells]
    assert len(cells) == len(set(cells))
    assert Cell.parse("570.172.08-1877.3-amd64-cloud") in cells


def test_a_good_file_loads(tmp_path: Path) -> None:
    loaded = matrix.load(write(tmp_path, GOOD))
    assert [cell.id for cell in loaded.cells] == [
        "570.172.08-1877.10-amd64-cloud",
        "570.211.01-1877.10-amd64-cloud",
        "580.95.05-1877.10-amd64-cloud",
    ]


def test_a_driver_is_built_for_the_architectures_that_it_has_a_package_for(tmp_path: Path) -> None:
    both = GOOD.replace("[amd64]", "[amd64, arm64]").replace("  amd64: ", '  arm64: "1877.3"\n  amd64: ')
    only = both.replace('"580.95.05"', '"580.95.05"\n    arch: [amd64]')
    without = {cell.id for cell in matrix.load(write(tmp_path, both)).cells}
    (tmp_path / "only").mkdir()
    assert without - {cell.id for cell in matrix.load(write(tmp_path / "only", only)).cells} == {
        "580.95.05-1877.10-arm64-cloud"
    }


BAD = """\
inputs: upstream
os_tag: "gardenlinux0"
alias: "gardenlinux{gl}"
base:
  amd64: "1877.3"
  amd46: "1877.3"
drivers:
  - version: "570.172.08"
  - version: 570.10
  - version: "570.10"
  - sha256: {amd64: "cafe"}
releases:
  - gl: 1877.10
    arch: [amd64, amd64]
    flavor: [cloud]
  - gl: "1877.10"
    arch:
      - arm64
      - 1877.10
    flavour: [cloud]
  - gl: "1877.11"
    kernel: 6.12
    lifecycle: gone
    os_tag: "gardenlinux{x}"
    drivers: ["570.172.08", "570.211.01", 570.211.02]
    arch: [amd64]
    flavor: [cloud]
    drivers: ["570.172.08", "570.211.01", 570.10]
exclude:
  - driver: "==570.*"
    module_type: open
    colour: red
  - driver: 570 and up
    kernel: 6.1
    module_type: closed
    reason: "            "
  - driver: "==570.*"
    module_type: open
    reason: "this branch is broken"
inputs: lab
default: "570.172.08-1877.3-amd64-cloud"
gvisor:
  580: "570.172.08"
  "570": 570.10
  "57O": "570.172.08"
  "590": "590.48.01"
settings:
  NVIDIA_REDIST_URL: none
  PACKAGE_SHA: optional
"""


def test_all_problems_are_reported_in_one_go(tmp_path: Path) -> None:
    assert problems(tmp_path, BAD).splitlines() == [
        "matrix.yaml: has 33 problems",
        "  line 6: base.amd46: is not a known key; known: amd64, arm64; did you mean amd64?",
        '  line 9: drivers[1].version: must be quoted, or YAML reads it as 570.1: write "570.10"',
        "  line 10: drivers[2].version: is given twice: 570.10, first on line 9 as drivers[1].version: duplicate cells",
        "  line 11: drivers[3]: has no version",
        "  line 11: drivers[3].sha256.amd64: is not a sha256 in 64 hexadecimal digits, got 'cafe'",
        '  line 13: releases[0].gl: must be quoted, or YAML reads it as 1877.1: write "1877.10"',
        "  line 14: releases[0].arch[1]: is given twice: amd64, first on line 14 as releases[0].arch[0]: "
        "duplicate cells",
        "  line 16: releases[1]: has no flavor",
        "  line 16: releases[1].gl: is given twice: 1877.10, first on line 13 as releases[0].gl: duplicate cells",
        "  line 17: releases[1].arch: has arm64, for which base names no release",
        '  line 19: releases[1].arch[1]: must be quoted, or YAML reads it as 1877.1: write "1877.10"; and is not '
        "one of amd64, arm64, got '1877.10'",
        "  line 20: releases[1].flavour: is not a known key; known: gl, kernel, lifecycle, os_tag, drivers, "
        "arch, flavor; did you mean flavor?",
        '  line 22: releases[2].kernel: must be quoted, or YAML reads it as 6.12: write "6.12"; and is not the '
        "version of a kernel package, such as 6.12.44-3gl0, got '6.12'",
        "  line 23: releases[2].lifecycle: is not one of supported, past, got 'gone'",
        "  line 24: releases[2].os_tag: is not an OS part of the tags that the GPU Operator computes, such as "
        "gardenlinux0 ({gl} is the release), got 'gardenlinux{x}'",
        "  line 28: releases[2].drivers: is given twice, first on line 25",
        "  line 28: releases[2].drivers[1]: is not one of the drivers: 570.211.01",
        '  line 28: releases[2].drivers[2]: must be quoted, or YAML reads it as 570.1: write "570.10"',
        "  line 30: exclude[0]: has no reason",
        "  line 32: exclude[0].colour: is not a known key; known: driver, kernel, module_type, reason",
        "  line 33: exclude[1].driver: is not a version range of drivers, such as ==550.*, got '570 and up'",
        '  line 34: exclude[1].kernel: must be quoted, or YAML reads it as 6.1: write "6.1"; and is not a '
        "version range of upstream kernels, such as >=6.12.107,<6.13 (without it: any), got '6.1'",
        "  line 35: exclude[1].module_type: is not one of open, proprietary, got 'closed'",
        "  line 36: exclude[1].reason: is not a reason of ten characters or more, got '            '",
        "  line 37: exclude[2]: is given twice: ==570.* any kernel open, first on line 30 as exclude[0]: "
        "duplicate rules",
        "  line 40: inputs: is given twice, first on line 1",
        "  line 41: default: is not a cell of this file: 570.172.08-1877.3-amd64-cloud",
        "  line 43: gvisor.580: is not of this branch: 570.172.08",
        '  line 43: gvisor.580: must be quoted, or YAML reads it as 580: write "580"',
        '  line 44: gvisor.570: must be quoted, or YAML reads it as 570.1: write "570.10"',
        "  line 45: gvisor.57O: is not a driver branch, such as 570, got '57O'",
        "  line 46: gvisor.590: is not one of the drivers: 590.48.01",
        "  line 49: settings.PACKAGE_SHA: is not a known key; known: GL_REGISTRY, NVIDIA_BASE_URL, "
        "NVIDIA_REDIST_URL, KERNEL_IMAGE, LOAD_TEST, PACKAGE_SHA256, IMAGE_PATH; did you mean PACKAGE_SHA256?",
        "hint: the rules are in builds/schema/matrix.json",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"580.95.05"', '"570.172.08"', "line 9: drivers[2].version: is given twice: 570.172.08, first on line 7"),
        ('"580.95.05"', "570.172.08", "line 9: drivers[2].version: is given twice: 570.172.08, first on line 7"),
        ('driver: "==570.*"', 'driver: "570 and up"', "line 15: exclude[0].driver: is not a version range"),
        ('driver: "==570.*"', 'driver: " "', "line 15: exclude[0].driver: is not a version range"),
        ("[amd64]", "[arm64]", "line 12: releases[0].arch: has arm64, for which base names no release"),
        ("[cloud]", "[cloudy]", "line 13: releases[0].flavor[0]: is not one of cloud, baremetal, got 'cloudy'"),
        ("[cloud]", "[]", "line 13: releases[0].flavor: must not be empty"),
        ("[cloud]", "cloud", "line 13: releases[0].flavor: must be a list"),
        ('"580.95.05"', '"580.95.05"\n    arch: [x86]', "line 10: drivers[2].arch[0]: is not one of amd64, arm64"),
        ('"580.95.05"', '"580.95.05"\n    arch: [amd64, amd64]', "line 10: drivers[2].arch[1]: is given twice: amd64"),
        ("[cloud]", "[cloud, cloud]", "line 13: releases[0].flavor[1]: is given twice: cloud, first on line 13"),
        ("inputs: upstream", "inputs: upstream\ninputs: lab", "line 2: inputs: is given twice, first on line 1"),
        ("module_type: open", "module_type: closed", "line 17: exclude[0].module_type: is not one of open, propr"),
        ('  amd64: "1877.3"', '  - "1877.3"', "line 4: base: must be a mapping"),
        ('"570.211.01"', '{major: "570"}', "line 8: drivers[1].version: must be a text"),
        ('- version: "570.211.01"', "- 570.211", "line 8: drivers[1]: must be a mapping"),
        ("inputs:", "settings: {IMAGE: x}\ninputs:", "line 1: settings.IMAGE: is not a known key; known: GL_REGISTRY"),
        ('"a signature changed"', '"changed"', "line 18: exclude[0].reason: is not a reason of ten characters or more"),
        ("drivers:", "drivers: !!omap", "line 6: drivers: has a tag, which means nothing here: tag:yaml.org,2002:omap"),
        ("inputs:", "? [a, b]\n: c\ninputs:", "line 1: file: has a key that is no text"),
    ],
)
def test_a_bad_file_is_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    (found,) = (line for line in lines(tmp_path, GOOD.replace(old, new)) if "must be quoted" not in line)
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("written", "reading"),
    [
        ("1877.10", "1877.1"),
        ("0100", "64"),
        ("1_000", "1000"),
        ("0x10", "16"),
        ("1e3", None),
        ("yes", "True"),
        ("null", "null"),
        ("2024-01-01", "a date"),
        ("2024-99-99", "a date"),
    ],
)
def test_a_scalar_that_yaml_misreads_must_be_quoted_as_it_is_written(
    written: str, reading: str | None, tmp_path: Path
) -> None:
    for quoted, sound in ((written, reading is None), (f'"{written}"', True), (f"!!str {written}", True)):
        text = GOOD.replace('os_tag: "gardenlinux0"', f"os_tag: {quoted}")
        if sound:
            assert matrix.load(write(tmp_path, text)).os_tag == written
        else:
            said = f'line 2: os_tag: must be quoted, or YAML reads it as {reading}: write "{written}"'
            assert lines(tmp_path, text) == [said]
        matrix.load.cache_clear()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("570:46", 'must be quoted, or YAML reads it as 34246: write "570:46"; and is not a driver version, such as '),
        ("!!float x", 'must be quoted, or YAML reads it as float: write "x"; and is not a driver version'),
        ("!mine 570.10", 'must be quoted, or YAML reads it as !mine: write "570.10"'),
        ("", "has no value"),
    ],
)
def test_a_place_has_one_problem(written: str, said: str, tmp_path: Path) -> None:
    (found,) = lines(tmp_path, GOOD.replace('"580.95.05"', written))
    assert found.startswith(f"line 9: drivers[2].version: {said}")


RULE = """\
  - &rule
    driver: "==570.*"
    kernel: ">=6.18.41,<6.19"
    module_type: open
    reason: "a signature changed"
"""


def test_aliases_and_merge_keys_are_what_they_stand_for(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("  - driver")] + RULE
    loaded = matrix.load(write(tmp_path, text + '  - <<: *rule\n    driver: "==580.*"\n'))
    assert [rule.driver for rule in loaded.rules] == ["==570.*", "==580.*"]
    assert loaded.rules[0].reason == loaded.rules[1].reason


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("*rule", "exclude[1]: is given twice: ==570.* <6.19,>=6.18.41 open, first on line 15 as exclude[0]"),
        (
            '{<<: *rule, kernel: "<6.19, >=6.18.41"}',
            "exclude[1]: is given twice: ==570.* <6.19,>=6.18.41 open, first on",
        ),
        ("{<<: *rule, module_type: proprietary, kernel: []}", "exclude[1].kernel: must be a text"),
        ("{<<: [*rule, 1]}", "exclude[1].<<: is not a known key"),
    ],
)
def test_an_alias_stands_where_it_is_written(entry: str, said: str, tmp_path: Path) -> None:
    found = lines(tmp_path, GOOD[: GOOD.index("  - driver")] + RULE + f"  - {entry}\n")
    assert any(line.startswith(f"line 20: {said}") for line in found)


OF_KEYS = ("has no ", "known key", "is not a driver branch")
"""What is said of a key, which may be said of what is wrong with its value too."""


def places(part: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(part, dict | list):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("version", ["570.172.08", "2150.0.0"])
def test_a_version_is_quoted_also_where_yaml_reads_text(version: str, tmp_path: Path) -> None:
    text = GOOD.replace('os_tag: "gardenlinux0"', f"os_tag: {version}")
    assert lines(tmp_path, text) == [f'line 2: os_tag: must be quoted, as every version: write "{version}"']


@pytest.mark.parametrize("tag", [" ", "é", "a\\nb", "x y"])
def test_an_os_tag_has_what_a_tag_may_have(tag: str, tmp_path: Path) -> None:
    (found,) = lines(tmp_path, GOOD.replace('os_tag: "gardenlinux0"', f'os_tag: "{tag}"'))
    assert found.startswith("line 2: os_tag: is not an OS part of the tags")


@pytest.mark.parametrize("junk", [None, "", 1.5, True, [], {}, [[]], [{}], {"a": {"b": 1}}, ["x"], [None]], ids=str)
def test_junk_is_refused_in_words_wherever_it_is_and_once(junk: object, tmp_path: Path) -> None:
    for path in list(places(yaml.safe_load(RICH)))[1:]:
        document = part = yaml.safe_load(RICH + 'default: "580.95.05-1877.10-amd64-cloud"\n')
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = junk
        if (path, junk) not in [(("exclude",), []), (("gvisor",), {}), (("settings",), {})]:
            found = lines(tmp_path, yaml.safe_dump(document))
            at = [line.split(": ")[1] for line in found if not any(what in line for what in OF_KEYS)]
            assert len(at) == len(set(at))


@pytest.mark.parametrize("text", ["", "- just\n- a list\n", "{unbalanced", "\tindented: badly", "text", "1.0", "---"])
def test_what_is_no_matrix_at_all_is_refused_in_words(text: str, tmp_path: Path) -> None:
    assert "matrix.yaml" in problems(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        b"inputs: \xff\xfe",
        b"drivers: &all [*all]",
        b"drivers: &all {<<: *all}",
        b"&all [? *all : x]",
        b"inputs: *nothing",
        b'inputs: "\\UFFFFFFFF"',
        b"[" * 5000,
        b"a: 1\n---\nb: 2",
    ],
)
def test_what_cannot_be_read_is_refused_in_words(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigurationError, match=r"matrix\.yaml: cannot be read as YAML, got \S"):
        matrix.load(path)


def test_a_rule_bites_by_driver_and_kernel_version(tmp_path: Path) -> None:
    (rule,) = matrix.load(write(tmp_path, GOOD)).rules
    assert rule.module_type is ModuleType.OPEN
    assert rule.applies("570.172.08", "6.18.41")
    assert not rule.applies("570.172.08", "6.18.40")
    assert not rule.applies("580.95.05", "6.18.41")


def test_a_rule_without_a_kernel_is_about_all_of_them() -> None:
    rule = matrix.Rule("==470.*", "", ModuleType.OPEN, "this branch has no open modules")
    assert rule.applies("470.256.02", "6.1.192")


def test_only_the_newest_driver_of_a_branch_owns_the_branch_tag(tmp_path: Path) -> None:
    loaded = matrix.load(write(tmp_path, GOOD))
    owners = [cell.driver for cell in loaded.cells if loaded.owns_branch(cell)]
    assert owners == ["570.211.01", "580.95.05"]


KERNELS = """\
inputs: upstream
os_tag: "gardenlinux0"
alias: "gardenlinux{gl}"
base: {amd64: "1.0"}
drivers: [{version: "570.172.08"}, {version: "570.211.01"}, {version: "470.1.0"}]
releases:
  - {gl: "1.10", kernel: "6.12.60-3gl2", arch: [amd64], flavor: [cloud, baremetal]}
  - {gl: "1.9", kernel: "6.12.60-3gl0", arch: [amd64], flavor: [cloud], drivers: ["570.172.08", "470.1.0"]}
  - {gl: "1.8", kernel: "6.12.60-3gl0", os_tag: "other{gl}", lifecycle: past, arch: [amd64], flavor: [cloud]}
  - {gl: "1.11", kernel: "6.12.6-1", arch: [amd64], flavor: [cloud]}
  - {gl: "1.12", arch: [amd64], flavor: [cloud]}
  - {gl: "1.13", arch: [amd64], flavor: [cloud]}
exclude:
  - {driver: "==570.211.*", kernel: "==6.12.6", module_type: open, reason: "excluded for a test"}
  - {driver: "==570.211.*", kernel: "==6.12.6", module_type: proprietary, reason: "excluded for a test"}
  - {driver: "==470.*", module_type: open, reason: "no open modules in this branch"}
"""


def cell(text: str) -> Cell:
    return Cell.parse(text)


def test_a_release_says_what_is_expected_of_its_kernel(tmp_path: Path) -> None:
    loaded = matrix.load(write(tmp_path, KERNELS))
    past = loaded.release(cell("570.172.08-1.8-amd64-cloud"))
    assert past == Release("1.8", "6.12.60-3gl0", Lifecycle.PAST, "other1.8")
    assert past.upstream == "6.12.60"
    unknown = loaded.release(cell("570.172.08-1.12-amd64-cloud"))
    assert unknown == Release("1.12", None, Lifecycle.SUPPORTED, "gardenlinux0")
    assert (unknown.upstream, unknown.kernel_name(cell("570.172.08-1.12-amd64-cloud"))) == (None, None)
    with pytest.raises(ConfigurationError, match=r"(?s)release 1\.99.*nearest: 1\.9"):
        loaded.release(cell("570.172.08-1.99-amd64-cloud"))


@pytest.mark.parametrize(
    ("one", "name"),
    [("570.172.08-1.10-amd64-cloud", "6.12.60-cloud-amd64"), ("570.172.08-1.10-amd64-baremetal", "6.12.60-amd64")],
)
def test_the_flavour_is_in_the_kernels_name_and_the_packages_build_is_not(one: str, name: str, tmp_path: Path) -> None:
    assert matrix.load(write(tmp_path, KERNELS)).release(cell(one)).kernel_name(cell(one)) == name


@pytest.mark.parametrize(
    ("one", "siblings"),
    [
        ("570.172.08-1.10-amd64-cloud", ["570.172.08-1.9-amd64-cloud", "570.172.08-1.10-amd64-cloud"]),
        ("570.172.08-1.9-amd64-cloud", ["570.172.08-1.9-amd64-cloud", "570.172.08-1.10-amd64-cloud"]),
        ("570.211.01-1.10-amd64-cloud", ["570.211.01-1.10-amd64-cloud"]),  # 1.9 is not built with this driver
        ("570.172.08-1.10-amd64-baremetal", ["570.172.08-1.10-amd64-baremetal"]),
        ("570.172.08-1.8-amd64-cloud", ["570.172.08-1.8-amd64-cloud"]),  # another OS tag
        ("570.172.08-1.11-amd64-cloud", ["570.172.08-1.11-amd64-cloud"]),  # 6.12.6 is not 6.12.60
        ("570.172.08-1.12-amd64-cloud", ["570.172.08-1.12-amd64-cloud"]),  # nobody knows, nor of 1.13
    ],
)
def test_siblings_compute_the_same_tag(one: str, siblings: list[str], tmp_path: Path) -> None:
    assert [each.id for each in matrix.load(write(tmp_path, KERNELS)).siblings(cell(one))] == siblings


@pytest.mark.parametrize(
    ("one", "owns"),
    [
        ("570.211.01-1.10-amd64-cloud", True),
        ("570.172.08-1.10-amd64-cloud", False),
        ("570.172.08-1.9-amd64-cloud", False),  # its tag is that of 1.10, for which there is a newer driver
        ("570.211.01-1.11-amd64-cloud", True),  # as far as it goes: it is excluded
        ("570.172.08-1.11-amd64-cloud", True),  # the newer one has no image for this kernel
        ("570.172.08-1.12-amd64-cloud", False),
        ("470.1.0-1.10-amd64-cloud", True),
    ],
)
def test_the_newest_driver_that_is_built_for_a_node_owns_its_branch(one: str, owns: bool, tmp_path: Path) -> None:
    assert matrix.load(write(tmp_path, KERNELS)).owns_branch(cell(one)) is owns


@pytest.mark.parametrize(
    ("one", "absent"),
    [
        ("570.211.01-1.11-amd64-cloud", {"open", "proprietary"}),
        ("570.211.01-1.12-amd64-cloud", set()),  # the kernel is not known
        ("470.1.0-1.11-amd64-cloud", {"open"}),
        ("470.1.0-1.12-amd64-cloud", {"open"}),  # whatever the kernel
    ],
)
def test_what_rules_are_expected_to_exclude(one: str, absent: set[str], tmp_path: Path) -> None:
    assert set(matrix.load(write(tmp_path, KERNELS)).absent(cell(one))) == absent


def test_every_gvisor_pin_is_a_driver_of_the_matrix() -> None:
    _, release_matrix = matrix.load_all()
    assert release_matrix.gvisor == {"590": "590.48.01", "580": "580.173.02", "570": "570.195.03"}
    assert set(release_matrix.gvisor.values()) <= {each.driver for each in release_matrix.cells}


def ids(**environ: str) -> list[str]:
    return [cell.id for cell in matrix.select(environ)]


def test_nothing_exported_selects_the_labs_default_cell() -> None:
    assert ids() == ["550.163.01-debian12-amd64-cloud"]


def test_the_documented_selection() -> None:
    assert ids(DRIVER_VERSION="570.172.08", GL_VERSION="1877.3") == ["570.172.08-1877.3-amd64-cloud"]


def test_metal_is_accepted_for_baremetal() -> None:
    assert ids(GL_VERSION="1877.3", KERNEL_FLAVOR="metal") == ids(GL_VERSION="1877.3", KERNEL_FLAVOR="baremetal")


def test_another_architecture_or_flavour_alone_is_that_of_the_default_cell() -> None:
    assert matrix.select({"TARGET_ARCH": "arm64"}) == (Cell.parse("550.163.01-debian12-arm64-cloud"),)
    assert [str(cell) for cell in matrix.select({"TARGET_ARCH": "all", "KERNEL_FLAVOR": "metal"})] == [
        "550.163.01-debian12-amd64-baremetal",
        "550.163.01-debian12-arm64-baremetal",
    ]


def test_lists_select_several() -> None:
    assert len(ids(GL_VERSION="1877.8, 1877.9", DRIVER_VERSION="570.211.01", TARGET_ARCH="all")) == 4


def of_lifecycle(*lifecycles: Lifecycle) -> set[str]:
    return {cell.id for of in matrix.load_all() for cell in of.cells if of.release(cell).lifecycle in lifecycles}


def test_a_word_selects_every_cell_of_its_releases() -> None:
    lab, releases = matrix.load_all()
    assert set(ids(GL_VERSION="all")) == of_lifecycle(Lifecycle.SUPPORTED) - {cell.id for cell in lab.cells}
    assert set(ids(GL_VERSION="past")) == of_lifecycle(Lifecycle.PAST)
    assert set(ids(GL_VERSION="lab")) == {cell.id for cell in lab.cells}
    assert set(ids(GL_VERSION="all,past,lab")) == {cell.id for of in (lab, releases) for cell in of.cells}
    assert {cell.gl for cell in matrix.select({"DRIVER_VERSION": "550.163.01"})} >= {"debian12", "1877.3"}


def test_a_past_release_is_selected_by_name_only() -> None:
    assert ids(GL_VERSION="1877.4", DRIVER_VERSION="570.211.01") == ["570.211.01-1877.4-amd64-cloud"]
    assert not any("-1877.4-" in text for text in ids(DRIVER_VERSION="570.211.01"))
    assert matrix.find("570.211.01-1877.4-amd64-cloud").gl == "1877.4"


def test_cells_come_in_the_order_of_their_versions() -> None:
    releases = [text.split("-")[1] for text in ids(DRIVER_VERSION="590.48.01", GL_VERSION="1877.9,1877.10,1592.18")]
    assert releases == ["1592.18", "1877.9", "1877.10"]


def test_all_leaves_what_is_set_as_it_is() -> None:
    assert {text.split("-")[2] for text in ids(GL_VERSION="all", TARGET_ARCH="arm64")} == {"arm64"}


@pytest.mark.parametrize(
    ("variable", "value", "near"),
    [("GL_VERSION", "1877.33", r"1877\.3"), ("DRIVER_VERSION", "550.163.1", "550.163.01")],
)
def test_an_unknown_value_is_an_error_that_names_the_nearest(variable: str, value: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=near):
        matrix.select({variable: value})


@pytest.mark.parametrize("variable", ["DRIVER_VERSION", "GL_VERSION", "TARGET_ARCH", "KERNEL_FLAVOR"])
@pytest.mark.parametrize("value", [" ", ",", " , "])
def test_a_list_of_nothing_is_not_all(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{variable}: names nothing"):
        matrix.select({variable: value})


def test_a_selection_without_a_cell_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="holds no cell"):
        matrix.select({"GL_VERSION": "debian12", "DRIVER_VERSION": "570.172.08"})


def test_an_unknown_cell_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"550\.163\.01-debian12-amd64-cloud"):
        matrix.matrix_of(Cell.parse("550.163.02-debian12-amd64-cloud"))


@pytest.mark.parametrize("text", ["", "570", "570.172.08-1877.3-amd64", "570.172.08-1877.3-riscv64-cloud", "a b"])
def test_what_is_no_cell_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a cell id"):
        Cell.parse(text)


def test_a_cell_id_reads_back() -> None:
    assert Cell.parse("570.172.08-1877.3-amd64-metal").id == "570.172.08-1877.3-amd64-baremetal"
