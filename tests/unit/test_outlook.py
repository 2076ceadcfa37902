"""The outlook: what becomes of cells, told offline. Made-up matrices show the rules, the real one has the figures."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from builds import __main__ as cli
from builds import matrix, outlook, outputs
from builds.errors import ConfigurationError
from builds.matrix import Matrix
from builds.model import Cell, ModuleType
from builds.outlook import Claim, Outlook, Status

TEXT = """\
inputs: upstream
os_tag: "gardenlinux0"
alias: "gardenlinux{gl}"
base: {amd64: "1.0", arm64: "1.0"}
drivers: [{version: "570.172.08"}, {version: "570.211.01"}, {version: "470.1.0"}]
releases:
  - {gl: "1.8", kernel: "6.12.60-3gl0", arch: [amd64], flavor: [cloud]}
  - {gl: "1.9", kernel: "6.12.60-3gl2", arch: [amd64], flavor: [cloud]}
  - {gl: "1.10", kernel: "6.12.60-3gl2", arch: [amd64], flavor: [cloud]}
  - {gl: "1.11", kernel: "6.12.68-1", arch: [amd64], flavor: [cloud]}
  - {gl: "1.12", arch: [amd64], flavor: [cloud]}
  - {gl: "1.13", kernel: "6.12.70-1", arch: [amd64], flavor: [cloud]}
  - {gl: "1.14", kernel: "6.12.71-1", arch: [amd64], flavor: [cloud]}
  - {gl: "2.0", arch: [amd64], flavor: [cloud]}
exclude:
  - {driver: "==570.*", kernel: ">=6.12.71", module_type: open, reason: "breaks the open ones"}
  - {driver: "==570.*", kernel: ">=6.12.71", module_type: proprietary, reason: "breaks the others"}
  - {driver: "==470.*", module_type: open, reason: "no open modules in this branch"}
"""


def read(tmp_path: Path, text: str = TEXT, name: str = "matrix.yaml") -> Matrix:
    path = tmp_path / name
    path.write_text(text)
    return matrix.load(path)


def cells(*texts: str) -> list[Cell]:
    return [Cell.parse(f"{text}-amd64-cloud") for text in texts]


def became(found: Outlook) -> dict[str, Status]:
    return {f"{one.cell.driver}-{one.cell.gl}": one.status for one in found.cells}


def plan(of: Matrix, *texts: str, made: Iterable[Cell] = ()) -> Outlook:
    return outlook.make([of], cells(*texts), list(made))


def test_builds_of_one_kernel_name_are_one_image_with_a_module_set_each(tmp_path: Path) -> None:
    found = plan(read(tmp_path), "570.211.01-1.8", "570.211.01-1.9", "570.211.01-1.10")
    assert list(became(found).values()) == [Status.BUILD, Status.JOINED, Status.REUSED]
    (image,) = found.images
    assert image.name == "570.211.01-6.12.60-cloud-amd64-gardenlinux0"
    assert [(one.package, one.releases) for one in image.sets] == [
        ("6.12.60-3gl0", ("1.8",)),
        ("6.12.60-3gl2", ("1.9", "1.10")),
    ]
    assert image.tags == (
        "570-6.12.60-cloud-amd64-gardenlinux0",
        "570.211.01-6.12.60-cloud-amd64-gardenlinux0",
        *(f"570-6.12.60-cloud-amd64-gardenlinux{gl}" for gl in ("1.8", "1.9", "1.10")),
    )
    assert {one.image for one in found.cells} == {image.name}
    assert "570.211.01-1.8-amd64-cloud" in found.cells[1].note
    assert "570.211.01-1.9-amd64-cloud" in found.cells[2].note
    assert found.collisions == ()


def test_an_image_is_the_same_whichever_of_its_cells_are_selected(tmp_path: Path) -> None:
    whole = plan(read(tmp_path), "570.211.01-1.8", "570.211.01-1.9", "570.211.01-1.10").images[0]
    (alone,) = plan(read(tmp_path), "570.211.01-1.9").images
    assert (alone.name, alone.sets, alone.tags) == (whole.name, whole.sets, whole.tags)
    assert [cell.gl for cell in alone.cells] == ["1.9"]


def test_what_is_on_this_machine_is_reused_and_so_is_what_has_the_same_build(tmp_path: Path) -> None:
    here = cells("570.211.01-1.10", "570.211.01-1.12")
    found = plan(read(tmp_path), *(f"570.211.01-1.{n}" for n in (8, 9, 10, 11, 12)), made=here)
    assert became(found) == {
        "570.211.01-1.8": Status.JOINED,
        "570.211.01-1.9": Status.REUSED,
        "570.211.01-1.10": Status.REUSED,
        "570.211.01-1.11": Status.BUILD,
        "570.211.01-1.12": Status.REUSED,
    }
    assert [one.note for one in found.cells if one.cell in here] == ["on this machine", "on this machine"]


def test_rules_exclude_a_cell_or_one_module_type_of_it(tmp_path: Path) -> None:
    found = plan(read(tmp_path), "570.211.01-1.14", "470.1.0-1.14", "470.1.0-1.13")
    assert became(found) == {
        "570.211.01-1.14": Status.EXCLUDED,
        "470.1.0-1.14": Status.BUILD,
        "470.1.0-1.13": Status.BUILD,
    }
    excluded = found.cells[-1]
    assert excluded.absent == {ModuleType.OPEN: "breaks the open ones", ModuleType.PROPRIETARY: "breaks the others"}
    assert excluded.image is None
    assert {one.types for image in found.images for one in image.sets} == {(ModuleType.PROPRIETARY,)}
    assert found.counts["compiles"] == 2


def test_a_kernel_that_nobody_knows_is_said_to_be_unknown_with_the_rules_that_may_bite(tmp_path: Path) -> None:
    found = plan(read(tmp_path), "570.211.01-1.12", "470.1.0-1.12")
    assert set(became(found).values()) == {Status.UNKNOWN}
    notes = {one.cell.driver: one.note for one in found.cells}
    assert notes == {"570.211.01": "open and proprietary absent if the kernel is >=6.12.71", "470.1.0": ""}
    assert [set(one.absent) for one in found.cells] == [{ModuleType.OPEN}, set()]
    assert found.images == ()


def test_each_status_says_so_in_words() -> None:
    assert [*map(str, Status)] == ["build", "reused", "joined", "excluded", "unknown until resolved"]


def test_different_drivers_of_a_branch_do_not_collide(tmp_path: Path) -> None:
    found = plan(read(tmp_path), "570.211.01-1.8", "570.172.08-1.8")
    assert found.collisions == ()
    branch = "570-6.12.60-cloud-amd64-gardenlinux0"
    assert [image.driver for image in found.images if branch in image.tags] == ["570.211.01"]


@pytest.mark.parametrize(
    ("old", "new", "tag"),
    [
        (  # another file has the same driver for the same node
            "",
            "",
            "570-6.12.60-cloud-amd64-gardenlinux0",
        ),
        (  # the branch's newest driver is in another file
            'drivers: [{version: "570.172.08"}, {version: "570.211.01"}',
            'drivers: [{version: "570.299.01"}',
            "570-6.12.60-cloud-amd64-gardenlinux0",
        ),
        (  # an alias of one file is an OS tag of the other
            'os_tag: "gardenlinux0"\nalias: "gardenlinux{gl}"',
            'os_tag: "gardenlinux1.8"\nalias: "other{gl}"',
            "570-6.12.60-cloud-amd64-gardenlinux1.8",
        ),
    ],
)
def test_cells_that_write_one_tag_with_different_content_are_refused_both_named(
    old: str, new: str, tag: str, tmp_path: Path
) -> None:
    other = TEXT.replace('gl: "1.', 'gl: "9.').replace(old, new)
    matrices = [read(tmp_path), read(tmp_path, other, "other.yaml")]
    chosen = [cell for of in matrices for cell in of.cells if cell.gl in ("1.8", "9.8")]
    found = outlook.make(matrices, chosen)
    collision = next(one for one in found.collisions if one.tag == tag)
    assert {cell.gl for cell in collision.cells} == {"1.8", "9.8"}
    with pytest.raises(ConfigurationError, match="would be written by two cells") as caught:
        outlook.refuse(found.collisions)
    assert all(cell.id in str(caught.value) for cell in found.collisions[0].cells)


def test_equal_names_for_nodes_of_different_os_tags_do_not_collide(tmp_path: Path) -> None:
    other = TEXT.replace('gl: "1.', 'gl: "9.').replace('"gardenlinux0"', '"debian12"')
    matrices = [read(tmp_path), read(tmp_path, other, "other.yaml")]
    outlook.refuse(outlook.make(matrices, [cell for of in matrices for cell in of.cells]).collisions)


def test_an_os_tag_of_a_release_that_is_an_alias_of_another_is_refused(tmp_path: Path) -> None:
    """In one file: 1.9 is made a node of its own, whose tag is what people call 1.8's image."""
    text = TEXT.replace(
        '{gl: "1.9", kernel: "6.12.60-3gl2",', '{gl: "1.9", kernel: "6.12.60-3gl2", os_tag: "gardenlinux1.8",'
    )
    found = plan(read(tmp_path, text), "570.211.01-1.8", "570.211.01-1.9")
    assert [(one.tag, [cell.gl for cell in one.cells]) for one in found.collisions] == [
        ("570-6.12.60-cloud-amd64-gardenlinux1.8", ["1.8", "1.9"])
    ]


def test_claims_of_equal_content_agree() -> None:
    first, second = cells("570.211.01-1.8", "570.211.01-1.9")
    assert outlook.collisions([Claim("a", first, "x"), Claim("a", second, "x"), Claim("b", second, "y")]) == ()
    (collision,) = outlook.collisions([Claim("a", first, "x"), Claim("a", second, "y")])
    assert collision.cells == (first, second)


# What follows is about the real matrix.


@pytest.fixture(scope="module")
def everything() -> Outlook:
    return outlook.make(matrix.load_all(), matrix.select({"GL_VERSION": "all,past,lab"}))


@pytest.fixture(scope="module")
def supported() -> Outlook:
    return outlook.make(matrix.load_all(), matrix.select({"GL_VERSION": "all"}))


def test_what_is_planned_is_built_reused_or_excluded_or_said_to_be_unknown(everything: Outlook) -> None:
    document = json.loads(json.dumps(everything.to_json()))
    by_status = Counter(cell["status"] for cell in document["cells"])
    counts = document["counts"]
    assert {cell["id"] for cell in document["cells"]} == {c.id for of in matrix.load_all() for c in of.cells}
    assert counts["cells"] == len(document["cells"]) == sum(by_status.values())
    assert [counts[key] for key in ("build", "reused", "joined", "excluded", "unknown")] == [
        by_status[status.value]
        for status in (Status.BUILD, Status.REUSED, Status.JOINED, Status.EXCLUDED, Status.UNKNOWN)
    ]
    images = {image["name"]: image for image in document["images"]}
    for cell in document["cells"]:
        has_image = cell["status"] in ("build", "reused", "joined")
        assert has_image == (cell["image"] is not None)
        assert not has_image or cell["id"] in images[cell["image"]]["cells"]
    assert counts["images"] == len(images) == counts["build"]
    assert document["collisions"] == []


KNOWN = 41  # releases whose kernel is known; 37 kernel names, as 1592.17/.18, 1877.8/.9, .11/.12 and .14/.15 share one
NOT_FOR_1877_3 = ("570.195.03", "570.211.01")  # there, 570.172.08 is the branch's one driver


def test_how_many_compiles_and_images_remain_where_kernels_are_known(everything: Outlook) -> None:
    """Per driver, architecture and flavour: 41 releases, 38 kernel builds (two compiles each), 37 images."""
    releases: dict[tuple[str, ...], set[str]] = defaultdict(set)
    images, sets, compiles = Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for one in everything.cells:
        if one.kernel:
            releases[one.cell.driver, one.cell.arch, one.cell.flavor].add(one.cell.gl)
    for image in everything.images:
        node: tuple[str, ...] = (image.driver, image.arch, image.flavor)
        images[node] += 1
        sets[node] += len(image.sets)
        compiles[node] += sum(len(each.types) for each in image.sets)
    assert len(releases) == 7 * 2 * 2
    for node, known in releases.items():
        fewer = 1 if node[0] in NOT_FOR_1877_3 else 0
        assert len(known) == KNOWN - fewer
        assert (images[node], sets[node], compiles[node]) == (37 - fewer, 38 - fewer, 76 - 2 * fewer), node


def test_the_figures_of_the_whole_table(everything: Outlook, supported: Outlook) -> None:
    def figures(found: Outlook) -> dict[str, int]:
        of_garden_linux = [one for one in found.cells if "debian" not in one.cell.gl]
        unknown = sum(one.status is Status.UNKNOWN for one in of_garden_linux)
        keys = ("build", "reused", "joined", "excluded", "images", "module_sets", "compiles")
        return {"cells": len(of_garden_linux), "unknown": unknown} | {key: found.counts[key] for key in keys}

    assert figures(everything) == {
        "cells": 1448,
        "build": 1028,
        "reused": 84,
        "joined": 28,
        "excluded": 0,
        "unknown": 308,
        "images": 1028,
        "module_sets": 1056,
        "compiles": 2112,
    }
    assert figures(supported) == {
        "cells": 748,
        "build": 356,
        "reused": 56,
        "joined": 28,
        "excluded": 0,
        "unknown": 308,
        "images": 356,
        "module_sets": 384,
        "compiles": 768,
    }


@pytest.mark.parametrize(
    ("releases", "builds"),
    [
        (("1877.8", "1877.9"), 2),
        (("1877.11", "1877.12"), 1),
        (("1877.14", "1877.15"), 1),
        (("1592.17", "1592.18"), 1),
        (("1877.3",), 1),
    ],
)
def test_releases_with_one_kernel_name(releases: tuple[str, ...], builds: int, everything: Outlook) -> None:
    shipped = [one for one in everything.cells if one.cell.gl in releases and one.cell.driver == "580.178.04"]
    images = [image for image in everything.images if image.name in {one.image for one in shipped}]
    assert len(images) == 4
    assert {len(image.sets) for image in images} == {builds}
    assert {tuple(gl for each in image.sets for gl in each.releases) for image in images} == {releases}
    expected = [Status.BUILD, Status.JOINED if builds > 1 else Status.REUSED][: len(releases)]
    cloud = [one.status for one in shipped if (one.cell.arch, one.cell.flavor) == ("amd64", "cloud")]
    assert cloud == expected


def test_releases_whose_kernel_is_not_known_stay_so_until_resolved(everything: Outlook) -> None:
    unknown = {one.cell.gl for one in everything.cells if one.status is Status.UNKNOWN}
    assert {gl for gl in unknown if "debian" not in gl} == {
        *(f"1877.{n}" for n in range(19, 24)),
        *(f"2150.{n}.0" for n in range(4, 10)),
    }


# CI jobs.


def line_mates(cell: Cell, other: Cell) -> bool:
    parts = [(one.driver, one.arch, one.flavor, one.gl.partition(".")[0]) for one in (cell, other)]
    return parts[0] == parts[1]


@pytest.mark.parametrize("limit", [1, 2, 7, 64, 256, 5000])
def test_jobs_hold_each_cell_once_and_never_part_an_image(limit: int, supported: Outlook) -> None:
    jobs = outlook.groups(supported, limit)
    assert 1 <= len(jobs) <= limit
    assert all(jobs)
    assert sorted(cell.id for job in jobs for cell in job) == sorted(one.cell.id for one in supported.cells)
    job_of = {cell: number for number, job in enumerate(jobs) for cell in job}
    for image in supported.images:
        assert len({job_of[cell] for cell in image.cells}) == 1
    unknown = [one.cell for one in supported.cells if one.kernel is None]
    for cell in unknown:
        assert {job_of[other] for other in unknown if line_mates(cell, other)} == {job_of[cell]}


def test_a_cell_of_unknown_kernel_goes_with_its_neighbours(tmp_path: Path) -> None:
    """1.12 may have the kernel of 1.11 or of 1.13; 2.0 is of another line; 1.10 and older have another kernel."""
    found = plan(read(tmp_path), *(f"570.211.01-{gl}" for gl in ("1.8", "1.9", "1.10", "1.11", "1.12", "1.13", "2.0")))
    jobs = [[cell.gl for cell in job] for job in outlook.groups(found)]
    assert jobs == [["1.8", "1.9", "1.10"], ["1.11", "1.12", "1.13"], ["2.0"]]


def test_of_jobs_with_as_much_work_the_one_that_has_the_driver_package_gets_more(tmp_path: Path) -> None:
    found = plan(read(tmp_path), "570.172.08-1.11", "570.211.01-1.11", "570.211.01-1.13")
    assert [len({cell.driver for cell in job}) for job in outlook.groups(found, 2)] == [1, 1]


def test_excluded_cells_have_no_job(tmp_path: Path) -> None:
    assert outlook.groups(plan(read(tmp_path), "570.211.01-1.14")) == ()


def test_jobs_have_about_the_same_work(supported: Outlook) -> None:
    """No job has more than another by more than the largest piece of work that nobody may part."""
    work = {one.cell: 3 for one in supported.cells if one.kernel is None}
    for image in supported.images:
        work[image.cells[0]] = 1 + 2 * len(image.sets)
    largest = 3 * 6 + 3  # 2150.4.0 to 2150.9.0, and 2150.3.0
    for limit in (4, 100, 256):
        loads = [sum(work.get(cell, 0) for cell in job) for job in outlook.groups(supported, limit)]
        assert max(loads) - min(loads) <= largest


def test_jobs_are_the_same_in_whatever_order_cells_are_named(supported: Outlook) -> None:
    selected = matrix.select({"GL_VERSION": "all"})
    again = outlook.make(matrix.load_all(), reversed(selected))
    assert again == supported
    assert outlook.groups(again, 100) == outlook.groups(supported, 100)


def test_no_job_is_no_limit(supported: Outlook) -> None:
    with pytest.raises(ConfigurationError, match="must be 1 or more"):
        outlook.groups(supported, 0)


# The command line.


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT_DIR", str(tmp_path / "out"))
    return tmp_path / "out"


def test_a_plan_of_many_cells_is_told_offline_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    monkeypatch.setenv("GL_VERSION", "all,past")
    assert cli.main(["plan"]) == 0
    said = capsys.readouterr().err
    assert "unknown until resolved" in said
    assert "images: 1028, module sets: 1056, compiles: 2112" in said
    assert not elsewhere.exists()


def test_a_plan_in_json_is_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"570.211.01-1877.{n}-amd64-cloud" for n in (11, 12, 19)]
    monkeypatch.setattr(outputs, "made", lambda _out, _cells: {Cell.parse(ids[1])})
    assert cli.main(["plan", "--json", *ids]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"cells", "images", "counts", "collisions"}
    assert [(cell["id"], cell["status"], cell["note"]) for cell in document["cells"]] == [
        (ids[0], "reused", f"same image as {ids[1]}: the kernel package is equal"),
        (ids[1], "reused", "on this machine"),
        (ids[2], "unknown until resolved", "open and proprietary absent if the kernel is >=6.18.41"),
    ]


def test_a_table_says_which_other_releases_an_image_is_for_and_why_something_is_absent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    monkeypatch.setattr(matrix, "FILES", (tmp_path / "a.yaml",))
    names = ("570.211.01-1.10", "570.211.01-1.14", "470.1.0-1.13", "570.211.01-2.0")
    assert cli.main(["plan", *(cell.id for cell in cells(*names))]) == 0
    said = capsys.readouterr().err
    rows = {tuple(part.strip() for part in line.split("│")[1:-1]) for line in said.splitlines() if line.startswith("│")}
    assert rows == {
        ("470.1.0", "6.12.70-cloud-amd64", "amd64 cloud", "1.13", "build", "open absent [1]"),
        (
            "570.211.01",
            "6.12.60-cloud-amd64",
            "amd64 cloud",
            "1.10",
            "build",
            "2 module sets [2]; also that of 1.8, 1.9",
        ),
        (
            "570.211.01",
            "6.12.71-cloud-amd64",
            "amd64 cloud",
            "1.14",
            "excluded",
            "open absent [3]; proprietary absent [4]",
        ),
        ("570.211.01", "", "amd64 cloud", "2.0", "unknown until resolved", "rules [5]"),
    }
    assert "[1] no open modules in this branch\n" in said
    assert "[2] builds of one kernel name, a module set each: 6.12.60-3gl0 (1.8), 6.12.60-3gl2 (1.9, 1.10)\n" in said
    assert "[5] open and proprietary absent if the kernel is >=6.12.71\n" in said
    assert "cells: 4 = 2 build + 0 reused + 0 joined + 1 excluded + 1 unknown until resolved\n" in said


def test_one_cell_offline(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--offline", "--json", "570.172.08-1877.3-amd64-cloud"]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert image["tags"] == [
        "570-6.12.44-cloud-amd64-gardenlinux0",
        "570.172.08-6.12.44-cloud-amd64-gardenlinux0",
        "570-6.12.44-cloud-amd64-gardenlinux1877.3",
    ]


def test_jobs_for_ci_are_what_the_verbs_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GL_VERSION", "all")
    assert cli.main(["plan", "--ci"]) == 0
    jobs = json.loads(capsys.readouterr().out)["include"]
    assert len(jobs) == 256
    assert len({job["name"] for job in jobs}) == 256
    named = [matrix.find(text) for job in jobs for text in job["cells"].split()]
    assert sorted(named) == sorted(matrix.select({"GL_VERSION": "all"}))
    assert cli.main(["plan", "--ci", "3"]) == 0
    assert len(json.loads(capsys.readouterr().out)["include"]) == 3


@pytest.mark.parametrize("limit", ["0", "257", "many", "-1"])
def test_a_number_of_jobs_that_cannot_be_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--ci", limit])
    assert ended.value.code == 2
    assert "--ci" in capsys.readouterr().err


def test_a_collision_ends_a_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, text in (("a.yaml", TEXT), ("b.yaml", TEXT.replace('gl: "1.', 'gl: "9.'))):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(matrix, "FILES", (tmp_path / "a.yaml", tmp_path / "b.yaml"))
    arguments = ["570.211.01-1.8-amd64-cloud", "570.211.01-9.8-amd64-cloud"]
    assert cli.main(["plan", "--json", *arguments]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["collisions"][0]["cells"] == arguments
    assert all(cell in said.err for cell in arguments)
    assert cli.main(["plan", "--ci", "1", *arguments]) == 2
    assert capsys.readouterr().out == ""
