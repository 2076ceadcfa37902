"""The values for the GPU Operator, held against the operator's own rules: they must lead to a tag that we push."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from builds import matrix, outlook, settings, tags
from builds.model import Cell
from builds.tags import TagKind

FILE = Path(__file__).parents[2] / "helm" / "gpu-operator-values.yaml"
CELL = Cell.parse("570.172.08-1877.3-amd64-cloud")
KERNEL = "6.12.44-cloud-amd64"
OS_LABEL = "system-os_release"

GARDEN_LINUX = {"ID": "gardenlinux", "VERSION_ID": "1877.3", "GARDENLINUX_VERSION": "1877.3"}
OLDER_GARDEN_LINUX = {"ID": "gardenlinux", "VERSION_ID": "1592.14", "GARDENLINUX_VERSION": "1592.14"}
DEBIAN = {"ID": "debian", "VERSION_ID": "12"}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    document = yaml.safe_load(FILE.read_text())
    assert isinstance(document, dict)
    return document


def labels(values: Mapping[str, Any], os_release: Mapping[str, str]) -> dict[str, str]:
    """What node-feature-discovery labels a node with: its built-in labels, then those of the custom rules.

    Names are without the prefix that all of them get afterwards; a rule that spells it out makes a second label.
    """
    found = {f"{OS_LABEL}.{field}": os_release[field] for field in ("ID", "VERSION_ID")}
    for rule in values["node-feature-discovery"]["worker"]["config"]["sources"]["custom"]:
        (match,) = rule["matchFeatures"]
        assert match["feature"] == "system.osrelease"
        assert all(expression == {"op": "Exists"} for expression in match["matchExpressions"].values())
        if match["matchExpressions"].keys() <= os_release.keys():
            assert not any("/" in name for name in rule["labels"])
            found |= rule["labels"]
    return found


def operators_image(values: Mapping[str, Any], kernel: str, os_release: Mapping[str, str]) -> str:
    """The image that the operator pulls for a node: every part verbatim, nothing escaped."""
    driver, node = values["driver"], labels(values, os_release)
    os_part = node[f"{OS_LABEL}.ID"] + node[f"{OS_LABEL}.VERSION_ID"]
    tag = f"{driver['version']}-{kernel}-{os_part}"
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", tag)
    return f"{driver['repository']}/{driver['image']}:{tag}"


def test_the_operator_pulls_the_tag_that_we_push(values: dict[str, Any]) -> None:
    ours = matrix.matrix_of(CELL)
    computed = tags.compute(
        CELL,
        KERNEL,
        os_tag=ours.os_tag.format(gl=CELL.gl),
        aliases=[ours.alias.format(gl=CELL.gl)],
        owns_branch=ours.owns_branch(CELL),
        key="0" * 64,
    )
    (branch,) = (tag for tag in computed if tag.kind is TagKind.BRANCH)
    image_path = settings.resolve(environ={}).image_path
    assert operators_image(values, KERNEL, GARDEN_LINUX) == f"{image_path}:{branch.name}"
    assert branch.name == "570-6.12.44-cloud-amd64-gardenlinux0"


def test_nodes_of_mixed_releases_agree(values: dict[str, Any]) -> None:
    assert labels(values, GARDEN_LINUX) == labels(values, OLDER_GARDEN_LINUX)


def test_nodes_of_another_os_keep_their_version(values: dict[str, Any]) -> None:
    assert operators_image(values, "6.1.0-50-cloud-amd64", DEBIAN).endswith("-6.1.0-50-cloud-amd64-debian12")


def test_repository_and_image_are_the_default_image_path(values: dict[str, Any]) -> None:
    driver = values["driver"]
    default = {setting.variable: setting.default for setting in settings.SETTINGS}["IMAGE_PATH"]
    assert f"{driver['repository']}/{driver['image']}" == default


def test_the_driver_is_a_precompiled_branch_of_the_matrix(values: dict[str, Any]) -> None:
    driver = values["driver"]
    assert driver["enabled"] is True
    assert driver["usePrecompiled"] is True
    assert driver["version"] in {cell.driver_major for cell in matrix.matrix_of(CELL).cells}
    assert driver["kernelModuleType"] in ("auto", "open", "proprietary")


def test_on_every_supported_release_the_operator_pulls_a_tag_that_one_image_has(values: dict[str, Any]) -> None:
    """Of those whose kernel is known, that is, and with the default branch of the values."""
    selected = [cell for cell in matrix.select({"GL_VERSION": "all"}) if cell in matrix.matrix_of(CELL)]
    found = outlook.make(matrix.load_all(), selected)
    repository = settings.resolve(environ={}).image_path
    pushed = Counter(f"{repository}:{tag}" for image in found.images for tag in image.tags)
    nodes = {(one.cell.gl, one.kernel) for one in found.cells if one.kernel}
    assert len({gl for gl, _ in nodes}) == 16
    for gl, kernel in nodes:
        node = {"ID": "gardenlinux", "VERSION_ID": gl, "GARDENLINUX_VERSION": gl}
        assert pushed[operators_image(values, kernel, node)] == 1, (gl, kernel)


def test_the_default_branch_is_built_for_every_supported_release(values: dict[str, Any]) -> None:
    """A branch that gVisor pins and of which every supported release has a driver."""
    of = matrix.matrix_of(CELL)
    branch = values["driver"]["version"]
    assert branch in of.gvisor
    supported = {cell.gl for cell in matrix.select({"GL_VERSION": "all"}) if cell in of}
    assert {cell.gl for cell in of.cells if cell.driver_major == branch} >= supported


@pytest.mark.parametrize("where", ["gds", "gdrcopy"])
def test_what_the_operator_does_not_support_with_precompiled_drivers_is_off(values: dict[str, Any], where: str) -> None:
    assert values[where]["enabled"] is False


def test_what_the_image_does_not_support_yet_is_off(values: dict[str, Any]) -> None:
    assert values["driver"]["rdma"]["enabled"] is False


def test_nothing_is_installed_below_a_read_only_folder(values: dict[str, Any]) -> None:
    assert not values["toolkit"]["installDir"].startswith("/usr")
    assert values["cdi"]["enabled"] is True


def scalars(node: yaml.Node, path: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from scalars(value, f"{path}/{key.value}")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from scalars(value, f"{path}/-")
    elif isinstance(node, yaml.ScalarNode):
        yield path, node


def test_what_looks_like_a_number_is_quoted() -> None:
    """Versions and label values are strings to the operator and to Kubernetes; 570 unquoted would be a number."""
    document = yaml.compose(FILE.read_text())
    assert document
    found = dict(scalars(document))
    numbers = {path: node for path, node in found.items() if re.fullmatch(r"[0-9][0-9.]*", node.value)}
    assert {path.rsplit("/", 1)[1] for path in numbers} == {"version", f"{OS_LABEL}.VERSION_ID"}
    assert all(node.style == '"' for node in numbers.values())
