"""Plans: keys of just what a step depends on, rules, tags; and back from JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from builds import image, matrix, oci, outputs, pipeline, recheck
from builds import plan as planning
from builds.cache import Cache
from builds.console import Reporter
from builds.errors import ConfigurationError
from builds.kernel import Kernel
from builds.matrix import Rule
from builds.model import Arch, Cell, KernelBuild, ModuleType
from builds.plan import InputImage, InputPackage, Plan, Shipped
from builds.settings import resolve

CELL = Cell.parse("570.172.08-1877.3-amd64-cloud")
KERNEL = Kernel(
    build=KernelBuild("6.12.44-cloud-amd64", "6.12.44", "6.12.44-3gl0", "d1" * 32, modversions=True),
    source="/usr/src/linux-headers-6.12.44-common",
    output="/usr/src/linux-headers-6.12.44-cloud-amd64",
    compiler={"gcc-14": "14.2.0-19"},
    drm=False,
)


def make(
    *,
    cell: Cell = CELL,
    kernel: Kernel = KERNEL,
    base: str = "sha256:ba5e",
    kmodbuild: str = "sha256:b111d",
    package: str = "ac" * 32,
    rules: tuple[Rule, ...] = (),
    others: tuple[Shipped, ...] = (),
) -> Plan:
    return planning.make(
        cell,
        replace(matrix.matrix_of(CELL), rules=rules),
        shipped=[Shipped(cell.gl, kernel, InputImage("kmodbuild:amd64-1877.3", kmodbuild)), *others],
        base=InputImage("registry:1877.3", base),
        package=InputPackage("NVIDIA-Linux-x86_64-570.172.08.run", package, 300),
        image_path="registry/driver",
    )


def keys(plan: Plan) -> list[Mapping[ModuleType, str]]:
    """Keys of the modules, by type; one mapping a set."""
    return [one.modules for one in plan.sets]


def rule(module_type: ModuleType, kernel: str = ">=6.12.40,<6.13") -> Rule:
    return Rule("==570.*", kernel, module_type, f"no {module_type} here")


def test_a_plan_is_what_its_parts_make_it() -> None:
    assert make() == make()


def test_another_release_with_the_same_kernel_build_has_the_same_image() -> None:
    """The kmodbuild image and the release's name differ; what is in the image does not."""
    other = make(cell=replace(CELL, gl="1877.4"), kmodbuild="sha256:07e4")
    assert (keys(other), other.userspace, other.image) == (keys(make()), make().userspace, make().image)


@pytest.mark.parametrize(
    ("changed", "modules", "userspace"),
    [
        ({"package": "ff" * 32}, True, True),
        ({"base": "sha256:f00"}, False, False),
        ({"kernel": replace(KERNEL, build=replace(KERNEL.build, digest="d2" * 32))}, True, False),
        ({"kernel": replace(KERNEL, compiler={"gcc-14": "14.3.0-1"})}, True, False),
    ],
)
def test_a_key_changes_with_what_its_step_depends_on_only(
    changed: dict[str, object], modules: bool, userspace: bool
) -> None:
    before, after = make(), make(**changed)  # type: ignore[arg-type]
    assert (keys(before) != keys(after)) == modules
    assert (before.userspace != after.userspace) == userspace
    assert before.image != after.image


def test_a_type_that_a_rule_excludes_is_absent_with_the_reason() -> None:
    plan = make(rules=(rule(ModuleType.OPEN),))
    (one,), (without_rule,) = plan.sets, make().sets
    assert plan.types == (ModuleType.PROPRIETARY,)
    assert one.absent == {ModuleType.OPEN: "no open here"}
    assert one.modules[ModuleType.PROPRIETARY] == without_rule.modules[ModuleType.PROPRIETARY]
    assert plan.image != make().image


def test_a_rule_for_another_kernel_does_not_bite() -> None:
    assert make(rules=(rule(ModuleType.OPEN, ">=6.13"),)).sets[0].absent == {}


def test_a_cell_without_any_type_is_excluded() -> None:
    with pytest.raises(ConfigurationError, match="is excluded by rules") as caught:
        make(rules=(rule(ModuleType.OPEN), rule(ModuleType.PROPRIETARY)))
    assert "no open here" in str(caught.value)
    assert "no proprietary here" in str(caught.value)


REBUILT = replace(KERNEL, build=replace(KERNEL.build, package="6.12.44-3gl2", digest="d2" * 32))
"""Another build of the same kernel name."""


def next_release(kernel: Kernel) -> Shipped:
    return Shipped("1877.4", kernel, InputImage("kmodbuild:amd64-1877.4", "sha256:07e4"))


def test_builds_of_one_kernel_name_are_one_image_with_a_module_set_each() -> None:
    plan = make(others=(next_release(REBUILT),))
    assert [(one.releases, one.kernel.build.package) for one in plan.sets] == [
        (("1877.3",), "6.12.44-3gl0"),
        (("1877.4",), "6.12.44-3gl2"),
    ]
    assert len({one.id for one in plan.sets}) == 2
    assert plan.image not in (make().image, make(kernel=REBUILT).image)
    assert {tag.name for tag in plan.tags if tag.kind == "alias"} == {
        "570-6.12.44-cloud-amd64-gardenlinux1877.3",
        "570-6.12.44-cloud-amd64-gardenlinux1877.4",
    }
    assert image.labels(plan)["io.gardenlinux.nvidia.kernel-package"] == "6.12.44-3gl0,6.12.44-3gl2"


def test_releases_that_ship_the_same_build_share_one_set_and_both_have_their_alias() -> None:
    plan = make(others=(next_release(KERNEL),))
    (one,) = plan.sets
    assert one.releases == ("1877.3", "1877.4")
    assert one.kmodbuild.reference == "kmodbuild:amd64-1877.4"
    assert plan.image == make().image
    assert len({tag.name for tag in plan.tags if tag.kind == "alias"}) == 2


def test_a_kernel_of_another_name_is_left_out() -> None:
    """The matrix only expects that two releases' kernels have one name; their headers decide."""
    other = replace(KERNEL, build=replace(KERNEL.build, release="6.12.47-cloud-amd64", digest="d3" * 32))
    assert make(others=(next_release(other),)) == make()


def test_it_does_not_matter_which_of_the_cells_is_planned() -> None:
    """1877.8 and 1877.9 ship two builds of one kernel name."""
    shipped = [
        Shipped(gl, kernel, InputImage(f"kmodbuild:amd64-{gl}", f"sha256:{gl}"))
        for gl, kernel in (("1877.8", KERNEL), ("1877.9", REBUILT))
    ]
    cells = matrix.matrix_of(CELL).siblings(Cell.parse("570.211.01-1877.9-amd64-cloud"))
    assert [cell.gl for cell in cells] == ["1877.8", "1877.9"]
    plans = [
        planning.make(
            cell,
            matrix.matrix_of(cell),
            shipped=shipped,
            base=make().base,
            package=make().package,
            image_path="registry/driver",
        )
        for cell in cells
    ]
    assert replace(plans[1], cell=cells[0]) == plans[0]


def test_a_plan_survives_json() -> None:
    plan = make(rules=(rule(ModuleType.OPEN),), others=(next_release(REBUILT),))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_labels_do_not_name_the_release() -> None:
    said = json.dumps(image.labels(make()))
    assert "1877" not in said
    assert "6.12.44-3gl0" in said


def test_the_config_starts_the_installer_and_finds_the_libraries_of_its_architecture() -> None:
    plan = make(cell=replace(CELL, arch=Arch.ARM64))
    config = image.config(plan)
    assert (config["Entrypoint"], config["Cmd"]) == (["/usr/local/bin/nvidia-driver"], ["init"])
    assert "LD_LIBRARY_PATH=/opt/nvidia/driver/usr/lib/aarch64-linux-gnu" in config["Env"]


@pytest.mark.parametrize(
    "tag",
    [
        "registry/driver:570.172.08-6.12.44-cloud-amd64-gardenlinux0",
        "registry/driver:570-6.12.44-cloud-amd64-gardenlinux0",
        "127.0.0.1:5000/driver:570-6.12.44-cloud-amd64-gardenlinux0",
        "registry/driver:570-6.12.44-cloud-amd64-gardenlinux1877.3",
        "registry/driver:570.172.08-6.12.44-cloud-amd64-0123456789ab",
    ],
)
def test_a_tag_tells_its_cell(tag: str) -> None:
    assert recheck.cell_of([tag]) == CELL


def test_a_tag_of_a_kernel_that_nobody_expected_tells_its_cell_by_what_is_left() -> None:
    assert recheck.cell_of(["driver:570-6.1.0-50-cloud-amd64-gardenlinux1877.3"]).gl == "1877.3"


def test_a_release_of_unknown_kernel_is_told_by_its_own_name() -> None:
    """1877.19 turns out to have the kernel name that 1877.17 is known for."""
    tags = ["driver:570.211.01-6.12.87-cloud-amd64-gardenlinux0", "driver:570-6.12.87-cloud-amd64-gardenlinux1877.19"]
    assert recheck.cell_of(tags) == Cell.parse("570.211.01-1877.19-amd64-cloud")


def test_tags_of_releases_that_share_an_image_tell_the_oldest() -> None:
    aliases = [f"driver:570-6.12.60-cloud-amd64-gardenlinux1877.{patch}" for patch in (8, 9)]
    assert recheck.cell_of(aliases).gl == "1877.8"
    assert recheck.cell_of(["driver:570-6.12.60-cloud-amd64-gardenlinux0"]).gl == "1877.8"


def test_all_tags_together_tell_the_cell_where_one_alone_does_not() -> None:
    immutable = "driver:550.163.01-6.1.0-50-cloud-amd64-0123456789ab"
    with pytest.raises(ConfigurationError, match="--cell"):
        recheck.cell_of([immutable])
    assert recheck.cell_of([immutable, "driver:550-6.1.0-50-cloud-amd64-debian12"]).gl == "debian12"


@pytest.mark.parametrize(
    ("tags", "gl"),
    [
        (["driver:550-6.1.0-50-cloud-amd64-debian12"], "debian12"),
        (["driver:550-6.12.95_deb12-cloud-amd64-debian12.bpo"], "debian12.bpo"),
        (
            [
                "driver:550-6.12.95_deb12-cloud-amd64-debian12",
                "driver:550-6.12.95_deb12-cloud-amd64-debian12.bpo",
                "driver:550.163.01-6.12.95_deb12-cloud-amd64-0123456789ab",
            ],
            "debian12.bpo",
        ),
    ],
)
def test_releases_that_share_an_os_tag_are_told_apart_by_the_tag_for_people(tags: list[str], gl: str) -> None:
    assert recheck.cell_of(tags).gl == gl


def test_a_release_with_another_os_tag_keeps_its_name_in_the_tag_for_people() -> None:
    cell = Cell.parse("550.163.01-debian12.bpo-amd64-cloud")
    made = planning.make(
        cell,
        matrix.matrix_of(cell),
        shipped=[Shipped(cell.gl, KERNEL, InputImage("kmodbuild:amd64-debian12.bpo", "sha256:b111d"))],
        base=InputImage("registry:debian13", "sha256:ba5e"),
        package=InputPackage("NVIDIA-Linux-x86_64-550.163.01.run", "ac" * 32, 300),
        image_path="registry/driver",
    )
    assert made.os_tag == "debian12"
    names = [tag.name for tag in made.tags]
    assert "550-6.12.44-cloud-amd64-debian12" in names and "550-6.12.44-cloud-amd64-debian12.bpo" in names


@pytest.mark.parametrize("tags", [[], ["driver:latest"], ["driver:999-6.12.44-cloud-amd64-gardenlinux0"]])
def test_a_tag_that_tells_no_cell_is_an_error_that_asks_for_it(tags: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="--cell"):
        recheck.cell_of(tags)


def cell_run(cell: Cell, out: Path) -> pipeline.Run:
    settings = resolve(environ={"OUT_DIR": str(out), "CACHE_DIR": str(out.parent / "cache")})
    return pipeline.Run(cell, matrix.matrix_of(cell), settings, Cache(settings.cache_dir), Reporter())


def test_a_plan_that_would_take_the_modules_of_another_cells_kernel_build_is_refused(tmp_path: Path) -> None:
    """The matrix does not know the kernels of 1877.22 and 1877.23; resolved, they have one name and two builds."""
    first, second = (replace(CELL, gl=gl) for gl in ("1877.22", "1877.23"))
    outputs.write_plan(tmp_path / first.id, make(cell=first))
    pipeline._refuse_collision(cell_run(first, tmp_path), make(cell=first, kernel=REBUILT))
    pipeline._refuse_collision(cell_run(second, tmp_path), make(cell=second))
    with pytest.raises(ConfigurationError, match="would take the tag") as caught:
        pipeline._refuse_collision(cell_run(second, tmp_path), make(cell=second, kernel=REBUILT))
    assert first.id in str(caught.value)
    assert second.id in str(caught.value)
    assert "6.12.44-3gl0 there, 6.12.44-3gl2 here" in str(caught.value)


def test_a_collision_that_the_matrix_knows_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    """A release whose alias is the OS tag of another with the same kernel name, and another build."""
    of = matrix.matrix_of(CELL)
    releases = dict(of.releases)
    releases["1877.8"] = replace(releases["1877.8"], os_tag="gardenlinux1877.9")
    cell = Cell.parse("570.211.01-1877.8-amd64-cloud")
    run = replace(cell_run(cell, tmp_path), matrix=replace(of, releases=releases))
    plan = make(cell=cell)
    with pytest.raises(ConfigurationError, match="would be written by two cells") as caught:
        pipeline._refuse_collision(run, plan)
    assert "570.211.01-1877.9-amd64-cloud" in str(caught.value)
    pipeline._refuse_collision(replace(run, matrix=of), plan)


def test_headers_of_another_kernel_than_the_matrix_expects_are_told(tmp_path: Path) -> None:
    said = io.StringIO()
    run = replace(cell_run(CELL, tmp_path), report=Reporter(Console(file=said, width=1000)))
    pipeline._say_unexpected(run, make())
    assert said.getvalue() == ""
    pipeline._say_unexpected(run, make(kernel=REBUILT))
    assert "1877.3: the matrix expects kernel 6.12.44-3gl0, the headers are those of 6.12.44-3gl2" in said.getvalue()


def test_an_image_is_made_if_a_build_from_the_same_inputs_would_make_it_again(tmp_path: Path) -> None:
    plan = make()
    assert outputs.made(tmp_path, [CELL]) == set()
    outputs.write_plan(tmp_path / CELL.id, plan)
    assert outputs.made(tmp_path, [CELL]) == set(), "a plan is no image"
    layout = tmp_path / CELL.id / "image"
    oci.create(layout)
    oci.add_image(layout, [], arch=Arch.AMD64, names=plan.names, config={"Labels": image.labels(plan)})
    assert outputs.made(tmp_path, [CELL]) == {CELL}
    outputs.write_plan(tmp_path / CELL.id, make(base="sha256:0ther"))
    assert outputs.made(tmp_path, [CELL]) == set(), "the image is of another plan"


def test_an_image_made_before_the_matrix_knew_of_another_build_is_made_again(tmp_path: Path) -> None:
    old, new = (Cell.parse(f"590.48.01-{gl}-amd64-cloud") for gl in ("1877.8", "1877.9"))
    alone = make(cell=new)
    both = make(cell=new, others=(Shipped(old.gl, REBUILT, InputImage("kmodbuild:amd64-1877.8", "sha256:b111e")),))
    assert matrix.matrix_of(new).siblings(new) == (old, new)
    for plan, made in ((alone, set()), (both, {new})):
        out = tmp_path / plan.image
        outputs.write_plan(out / new.id, plan)
        layout = out / new.id / "image"
        oci.create(layout)
        oci.add_image(layout, [], arch=Arch.AMD64, names=plan.names, config={"Labels": image.labels(plan)})
        assert outputs.made(out, [new]) == made


def test_a_summary_tells_of_every_cell_also_where_one_is_damaged(tmp_path: Path) -> None:
    cells = [replace(CELL, gl=gl) for gl in ("1877.8", "1877.9", "1877.10")]
    folders = {cell: tmp_path / cell.id for cell in cells}
    failed, damaged, nothing = folders.values()
    failed.mkdir()
    outputs.write_failure(failed, "build", ConfigurationError(f"cell {cells[0]}", "cannot be", got="nothing"))
    (damaged / "image").mkdir(parents=True)
    (damaged / "image/oci-layout").write_text("cut sh")
    said = io.StringIO()
    outputs.summary(folders, Reporter(Console(file=said, width=1000)))
    told = {cell: next(line for line in said.getvalue().splitlines() if f" {cell} " in line) for cell in cells}
    assert "build failed: cannot be, got nothing" in told[cells[0]]
    assert "has no readable index.json" in told[cells[1]]
    assert "not verified" in told[cells[2]]
    assert not nothing.exists()


def test_only_folders_of_ours_are_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    settings = resolve(environ={"OUT_DIR": str(tmp_path), "CACHE_DIR": str(tmp_path.parent / "none")})
    with pytest.raises(ConfigurationError, match="was not empty when this project first used it"):
        pipeline.clean(settings, everything=True, report=Reporter())
    assert (tmp_path / "precious").exists()
