"""The matrix files: what is in them, what is refused and how it is said, what a selection selects."""

from __future__ import annotations

from pathlib import Path

import pytest

from builds import matrix
from builds.errors import ConfigurationError
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


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        matrix.load(write(tmp_path, text))
    return str(caught.value)


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


def test_an_unquoted_version_is_refused_with_its_line_and_as_it_was_written(tmp_path: Path) -> None:
    said = problems(tmp_path, GOOD.replace('gl: "1877.10"', "gl: 1877.10"))
    assert "line 11: releases[0].gl: must be quoted" in said
    assert 'write "1877.10"' in said


def test_all_problems_are_reported_in_one_go(tmp_path: Path) -> None:
    text = GOOD.replace('"1877.3"', "1877.3").replace('    reason: "a signature changed"\n', "") + "colour: red\n"
    said = problems(tmp_path, text)
    assert "has 3 problems" in said
    assert "line 5: base.amd64" in said
    assert "line 15: exclude[0]: 'reason' is a required property" in said
    assert "'colour' was unexpected" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"580.95.05"', '"570.172.08"', "line 9: drivers[2].version: is given twice: 570.172.08"),
        ('driver: "==570.*"', 'driver: "570 and up"', "exclude[0].driver: is not a version range"),
        ("[amd64]", "[arm64]", "releases[0].arch: has arm64, for which base names no release"),
        ("[cloud]", "[cloudy]", "releases[0].flavor[0]: 'cloudy' is not one of"),
        ("inputs: upstream", "inputs: upstream\ninputs: lab", "line 2: inputs: is given twice"),
        ("module_type: open", "module_type: closed", "exclude[0].module_type"),
    ],
)
def test_a_bad_file_is_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert said in problems(tmp_path, GOOD.replace(old, new))


@pytest.mark.parametrize("text", ["", "- just\n- a list\n", "{unbalanced", "\tindented: badly"])
def test_what_is_no_matrix_at_all_is_refused_in_words(text: str, tmp_path: Path) -> None:
    assert "matrix.yaml" in problems(tmp_path, text)


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


def ids(**environ: str) -> list[str]:
    return [cell.id for cell in matrix.select(environ)]


def test_nothing_exported_selects_the_labs_default_cell() -> None:
    assert ids() == ["550.163.01-debian12-amd64-cloud"]


def test_the_documented_selection() -> None:
    assert ids(DRIVER_VERSION="570.172.08", GL_VERSION="1877.3") == ["570.172.08-1877.3-amd64-cloud"]


def test_metal_is_accepted_for_baremetal() -> None:
    assert ids(GL_VERSION="1877.3", KERNEL_FLAVOR="metal") == ids(GL_VERSION="1877.3", KERNEL_FLAVOR="baremetal")


def test_lists_select_several() -> None:
    assert len(ids(GL_VERSION="debian12, 1877.3")) == 2


def test_all_releases_selects_every_cell() -> None:
    assert set(ids(GL_VERSION="all")) == {cell.id for of in matrix.load_all() for cell in of.cells}


def test_all_leaves_what_is_set_as_it_is() -> None:
    assert {text.split("-")[2] for text in ids(GL_VERSION="all", TARGET_ARCH="arm64")} == {"arm64"}


@pytest.mark.parametrize(
    ("variable", "value", "near"), [("GL_VERSION", "1877.33", "1877.3"), ("DRIVER_VERSION", "550.163.1", "550.163.01")]
)
def test_an_unknown_value_is_an_error_that_names_the_nearest(variable: str, value: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=near):
        matrix.select({variable: value})


def test_a_selection_without_a_cell_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="holds no cell"):
        matrix.select({"GL_VERSION": "debian12", "TARGET_ARCH": "arm64"})


def test_an_unknown_cell_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"550\.163\.01-debian12-amd64-cloud"):
        matrix.matrix_of(Cell.parse("550.163.02-debian12-amd64-cloud"))


@pytest.mark.parametrize("text", ["", "570", "570.172.08-1877.3-amd64", "570.172.08-1877.3-riscv64-cloud", "a b"])
def test_what_is_no_cell_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a cell id"):
        Cell.parse(text)


def test_a_cell_id_reads_back() -> None:
    assert Cell.parse("570.172.08-1877.3-amd64-metal").id == "570.172.08-1877.3-amd64-baremetal"
