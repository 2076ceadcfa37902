"""The values for the GPU Operator, held against the operator's own rules: they must lead to a tag that we push.

And the chart that checks a cluster: Helm itself lints and renders it.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from builds import __main__ as cli
from builds import helm, matrix, outlook, settings, tags
from builds.errors import ConfigurationError
from builds.matrix import Matrix
from builds.model import Arch, Cell, Flavor
from builds.tags import TagKind

FOLDER = Path(__file__).parents[2] / "helm"
BASE = "gpu-operator-values.yaml"
GVISOR = "gpu-operator-values-gvisor.yaml"
RESOURCES = "examples/nvidiadriver.resource.yaml"
CONFIG_MAP = "examples/module-parameters.configmap.yaml"
OVERLAYS = sorted({GVISOR, *(f"examples/{path.name}" for path in FOLDER.glob("examples/*.yaml"))})
OVERLAYS = [name for name in OVERLAYS if name not in (RESOURCES, CONFIG_MAP)]
CELL = Cell.parse("570.172.08-1877.3-amd64-cloud")
KERNEL = "6.12.44-cloud-amd64"
OS_LABEL = "system-os_release"
LAB, RELEASE = matrix.load_all()

GARDEN_LINUX = {"ID": "gardenlinux", "VERSION_ID": "1877.3", "GARDENLINUX_VERSION": "1877.3"}
OLDER_GARDEN_LINUX = {"ID": "gardenlinux", "VERSION_ID": "1592.14", "GARDENLINUX_VERSION": "1592.14"}
DEBIAN = {"ID": "debian", "VERSION_ID": "12"}


def merged(below: Any, above: Any) -> Any:
    """Values files one after the other, as Helm takes them: maps are merged, anything else is replaced."""
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {key: merged(below.get(key), above.get(key, below.get(key))) for key in {**below, **above}}
    return above


def load(*names: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        document = yaml.safe_load((FOLDER / name).read_text())
        assert isinstance(document, dict)
        found = merged(found, document)
    return found


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return load(BASE)


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


def composed(driver: Mapping[str, Any], node: Mapping[str, str], kernel: str) -> str:
    """The image that the operator pulls for a node: every part verbatim, nothing escaped."""
    os_part = node[f"{OS_LABEL}.ID"] + node[f"{OS_LABEL}.VERSION_ID"]
    tag = f"{driver['version']}-{kernel}-{os_part}"
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", tag)
    return f"{driver['repository']}/{driver['image']}:{tag}"


def operators_image(values: Mapping[str, Any], kernel: str, os_release: Mapping[str, str]) -> str:
    return composed(values["driver"], labels(values, os_release), kernel)


def drivers() -> list[tuple[str, Mapping[str, Any]]]:
    """Everything of ours that names a driver for Garden Linux nodes: values on their own or one on the other."""
    layered = [(BASE, (BASE,)), *((name, (BASE, name)) for name in OVERLAYS if name != "examples/debian-lab.yaml")]
    resources = yaml.safe_load_all((FOLDER / RESOURCES).read_text())
    return [
        *((name, load(*files)["driver"]) for name, files in layered),
        *((f"{RESOURCES}#{one['metadata']['name']}", one["spec"]) for one in resources),
    ]


@pytest.fixture(scope="module")
def pushed() -> Counter[str]:
    """How many images claim each tag, over every supported release, both architectures and flavours, all drivers."""
    cells = [cell for cell in matrix.select({"GL_VERSION": "all"}) if cell in RELEASE]
    assert {(cell.arch, cell.flavor) for cell in cells} == {(arch, flavor) for arch in Arch for flavor in Flavor}
    return Counter(tag for image in outlook.make((LAB, RELEASE), cells).images for tag in image.tags)


@functools.cache
def nodes() -> frozenset[tuple[str, str]]:
    """Release and kernel of every node whose kernel is known."""
    cells = [cell for cell in matrix.select({"GL_VERSION": "all"}) if cell in RELEASE]
    return frozenset((one.cell.gl, one.kernel) for one in outlook.make((LAB, RELEASE), cells).cells if one.kernel)


def computed(cell: Cell, kernel: str) -> dict[TagKind, str]:
    ours = matrix.matrix_of(cell)
    found = tags.compute(
        cell,
        kernel,
        os_tag=ours.release(cell).os_tag,
        aliases=[ours.alias.format(gl=cell.gl)],
        owns_branch=ours.owns_branch(cell),
        key="0" * 64,
    )
    return {tag.kind: tag.name for tag in found}


# The operator's tag rule


def test_the_documented_tag_is_what_the_operator_computes_and_what_we_push(values: dict[str, Any]) -> None:
    branch = computed(CELL, KERNEL)[TagKind.BRANCH]
    ours = merged(values, {"driver": {"version": "570"}})
    assert operators_image(ours, KERNEL, GARDEN_LINUX) == f"{settings.resolve(environ={}).image_path}:{branch}"
    assert branch == "570-6.12.44-cloud-amd64-gardenlinux0"


@pytest.mark.parametrize(("name", "driver"), drivers(), ids=[name for name, _ in drivers()])
def test_on_every_node_the_operator_pulls_a_tag_that_one_image_has(
    name: str, driver: Mapping[str, Any], values: dict[str, Any], pushed: Counter[str]
) -> None:
    """On those whose kernel is known, that is: releases of every series, both architectures, both flavours."""
    known = nodes()
    assert len({gl for gl, _ in known}) == 16
    assert len({kernel.rpartition("-")[2] for _, kernel in known}) == len(Arch)
    for gl, kernel in known:
        os_release = {"ID": "gardenlinux", "VERSION_ID": gl, "GARDENLINUX_VERSION": gl}
        image = composed(driver, labels(values, os_release), kernel)
        repository, _, tag = image.rpartition(":")
        assert pushed[tag] == 1, (name, gl, tag)
        if "example.com" not in repository:
            assert repository == settings.resolve(environ={}).image_path


def test_a_version_that_some_node_lacks_would_be_noticed(values: dict[str, Any], pushed: Counter[str]) -> None:
    """570.211.01 is the newest of its branch, and 1877.3 is built without it."""
    ours = merged(values, {"driver": {"version": "570.211.01"}})
    missing = set()
    for gl, kernel in nodes():
        os_release = {"ID": "gardenlinux", "VERSION_ID": gl, "GARDENLINUX_VERSION": gl}
        if not pushed[operators_image(ours, kernel, os_release).rpartition(":")[2]]:
            missing.add(gl)
    assert missing == {"1877.3"}


@pytest.mark.parametrize("kernel", ["6.1.0-50-cloud-amd64", "6.1.0-50-amd64", "6.1.0-50-cloud-arm64", "6.1.0-50-arm64"])
def test_on_a_debian_node_the_operator_pulls_the_labs_tag(kernel: str) -> None:
    arch = Arch(kernel.rpartition("-")[2])
    flavor = Flavor.CLOUD if "cloud" in kernel else Flavor.BAREMETAL
    assert LAB.default
    cell = replace(LAB.default, arch=arch, flavor=flavor)
    assert cell in LAB
    image = operators_image(load(BASE, "examples/debian-lab.yaml"), kernel, DEBIAN)
    assert image == f"registry.example.com/lab/driver:{computed(cell, kernel)[TagKind.BRANCH]}"
    assert image.endswith(f":550-{kernel}-debian12")


def test_nodes_of_mixed_releases_agree(values: dict[str, Any]) -> None:
    assert labels(values, GARDEN_LINUX) == labels(values, OLDER_GARDEN_LINUX)


def test_nodes_of_another_os_keep_their_version(values: dict[str, Any]) -> None:
    assert labels(values, DEBIAN)[f"{OS_LABEL}.VERSION_ID"] == "12"


@pytest.mark.parametrize(("name", "driver"), drivers(), ids=[name for name, _ in drivers()])
def test_every_driver_is_precompiled_and_no_digest(name: str, driver: Mapping[str, Any]) -> None:
    assert driver["usePrecompiled"] is True, name
    assert isinstance(driver["version"], str)
    assert re.fullmatch(r"[0-9]+(\.[0-9]+)*", driver["version"])
    assert driver["kernelModuleType"] in ("auto", "open", "proprietary")


@pytest.mark.parametrize(("name", "driver"), drivers(), ids=[name for name, _ in drivers()])
def test_a_node_looks_again_for_a_tag_that_moves_with_new_drivers(name: str, driver: Mapping[str, Any]) -> None:
    assert driver["imagePullPolicy"] == ("IfNotPresent" if "." in driver["version"] else "Always"), name


# Generated lines


def test_the_values_are_current() -> None:
    """If not: `nox -s helm`."""
    assert cli.main(["helm", "--check"]) == 0


def test_the_default_branch_serves_every_supported_node_and_gvisor(values: dict[str, Any]) -> None:
    branch = helm.default_branch(RELEASE)
    assert values["driver"]["version"] == branch
    assert load(BASE, GVISOR)["driver"]["version"] == RELEASE.gvisor[branch]
    assert RELEASE.gvisor[branch].startswith(f"{branch}.")
    wanted = {cell.gl for cell in matrix.select({"GL_VERSION": "all"}) if cell in RELEASE}
    assert {cell.gl for cell in RELEASE.cells if cell.driver == RELEASE.gvisor[branch]} >= wanted


def without(of: Matrix, *, driver: str, gl: str) -> Matrix:
    return replace(of, cells=tuple(cell for cell in of.cells if (cell.driver, cell.gl) != (driver, gl)))


def test_a_branch_without_a_driver_for_one_supported_node_is_no_default() -> None:
    assert helm.default_branch(RELEASE) == "590"
    assert helm.default_branch(without(RELEASE, driver="590.48.01", gl="1877.20")) == "580"
    assert helm.default_branch(without(RELEASE, driver="590.48.01", gl="1877.7")) == "590", "a past release"


def test_a_branch_that_gvisor_does_not_pin_for_every_node_is_no_default() -> None:
    assert helm.default_branch(replace(RELEASE, gvisor={"580": "580.173.02"})) == "580"
    assert helm.default_branch(replace(RELEASE, gvisor={"570": "570.172.08", "580": "580.173.02"})) == "580"
    with pytest.raises(ConfigurationError, match="no driver branch for the Helm values"):
        helm.default_branch(replace(RELEASE, gvisor={"570": "570.195.03"}))  # which 1877.3 is built without
    with pytest.raises(ConfigurationError, match="no driver branch for the Helm values"):
        helm.default_branch(replace(RELEASE, gvisor={}))


def test_a_branch_that_rules_exclude_on_a_supported_kernel_is_no_default() -> None:
    rules = tuple(replace(rule, driver="==590.*", kernel=">=6.18.19,<6.18.20") for rule in RELEASE.rules)
    assert {rule.module_type for rule in rules} == {"open", "proprietary"}
    assert helm.default_branch(replace(RELEASE, rules=rules)) == "580"


def test_branches_are_compared_as_numbers() -> None:
    cells = tuple(replace(cell, driver=cell.driver.replace("590.", "1000.", 1)) for cell in RELEASE.cells)
    ours = replace(RELEASE, cells=cells, gvisor={"580": "580.173.02", "1000": "1000.48.01"})
    assert helm.default_branch(ours) == "1000"


def test_only_values_of_marked_lines_change() -> None:
    text = '# a\nimage: "x"  # generated: image\n\nother: "y"\n- image: "x"   # generated: image'
    filled = helm.fill(text, {"image": "driver"}, "f")
    assert filled == '# a\nimage: "driver"  # generated: image\n\nother: "y"\n- image: "driver"   # generated: image\n'
    assert helm.fill(filled, {"image": "driver"}, "f") == filled


@pytest.mark.parametrize(
    "line", ['image: "x"  # generated: imgae', "image: x  # generated: image", 'list: ["x"]  # generated: image']
)
def test_a_marker_that_cannot_be_followed_is_an_error_with_its_line(line: str) -> None:
    with pytest.raises(ConfigurationError, match=r"values\.yaml:2") as error:
        helm.fill(f"a: b\n{line}\n", {"image": "driver"}, "values.yaml")
    assert error.value.got == line


def test_values_for_a_registry_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_PATH", "registry.example.com:5000/a/b/nvidia")
    before = {path: path.read_bytes() for path in FOLDER.rglob("*.yaml")}
    assert cli.main(["helm", "--output", str(tmp_path)]) == 0
    assert cli.main(["helm", "--output", str(tmp_path), "--check"]) == 0
    driver = yaml.safe_load((tmp_path / BASE).read_text())["driver"]
    assert (driver["repository"], driver["image"]) == ("registry.example.com:5000/a/b", "nvidia")
    theirs, ours = (tmp_path / BASE).read_text().splitlines(), (FOLDER / BASE).read_text().splitlines()
    assert sum(one != other for one, other in zip(theirs, ours, strict=True)) == 2
    assert {path: path.read_bytes() for path in FOLDER.rglob("*.yaml")} == before
    for one in yaml.safe_load_all((tmp_path / RESOURCES).read_text()):
        assert one["spec"]["repository"] == "registry.example.com:5000/a/b"


def test_a_stale_file_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("IMAGE_PATH", raising=False)
    assert cli.main(["helm", "--output", str(tmp_path)]) == 0
    path = tmp_path / GVISOR
    line = 1 + next(n for n, one in enumerate(path.read_text().splitlines()) if "generated:" in one)
    path.write_text(path.read_text().replace('"590.48.01"', '"590.1"'))
    assert cli.main(["helm", "--output", str(tmp_path), "--check"]) == 2
    assert f"{GVISOR}:{line} has `version:" in " ".join(capsys.readouterr().err.split())
    path.unlink()
    assert cli.main(["helm", "--output", str(tmp_path), "--check"]) == 2
    assert f"{GVISOR} is missing" in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_cannot_be_written_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["helm", "--output", str(tmp_path / "file")]) != 0
    said = capsys.readouterr().err
    assert "error: " in said
    assert "this program" not in said


# What the operator's chart knows

CHART_KEYS = {
    "driver.enabled",
    "driver.usePrecompiled",
    "driver.repository",
    "driver.image",
    "driver.version",
    "driver.imagePullPolicy",
    "driver.imagePullSecrets",
    "driver.kernelModuleType",
    "driver.kernelModuleConfig.name",
    "driver.rdma.enabled",
    "driver.rdma.useHostMofed",
    "driver.manager.repository",
    "driver.nvidiaDriverCRD.enabled",
    "driver.nvidiaDriverCRD.deployDefaultCR",
    "driver.useNvidiaDriverCRD",
    "gds.enabled",
    "gdrcopy.enabled",
    "toolkit.enabled",
    "toolkit.installDir",
    "cdi.enabled",
    *(
        f"{part}.{key}"
        for part in ("operator", "validator", "toolkit", "devicePlugin", "gfd", "dcgmExporter", "migManager")
        for key in ("repository", "imagePullSecrets")
    ),
    "node-feature-discovery.image.repository",
    "node-feature-discovery.imagePullSecrets",
    "node-feature-discovery.worker.config.sources.custom",
}
"""Keys of the gpu-operator chart that our files use; it has no schema, and takes unknown ones without a word.

Read from github.com/NVIDIA/gpu-operator, deployments/gpu-operator/values.yaml and templates/: commit d7413be9 (chart
v24.6: nvidiaDriverCRD), and a newer version of the file as a fork has it, rahulait/gpu-operator at 069fe433 (default
driver 595.58.03: useNvidiaDriverCRD). In which release the one key replaced the other was not looked up; neither of the
two has both, and v24.6 has no kernelModuleType yet. The last three are of the node-feature-discovery chart in it
(commit 17c08086). dcgmExporter.imagePullSecrets is in the template only.
"""

RESOURCE_KEYS = {
    "driverType",
    "usePrecompiled",
    "repository",
    "image",
    "version",
    "imagePullPolicy",
    "kernelModuleType",
    "nodeSelector",
}
"""Of api/nvidia/v1alpha1/nvidiadriver_types.go and crds/nvidia.com_nvidiadrivers.yaml, commits 06faaf0c, e7e81682."""


def keys(document: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def test_every_key_is_one_that_the_operators_chart_knows_and_every_known_one_is_used() -> None:
    used = {name: set(keys(load(name))) for name in (BASE, *OVERLAYS)}
    unknown = {name: found - CHART_KEYS for name, found in used.items() if found - CHART_KEYS}
    assert not unknown
    assert set().union(*used.values()) == CHART_KEYS


def test_the_resources_are_as_their_definition_wants_them() -> None:
    documents = list(yaml.safe_load_all((FOLDER / RESOURCES).read_text()))
    assert len({one["metadata"]["name"] for one in documents}) == 2
    for one in documents:
        assert (one["apiVersion"], one["kind"]) == ("nvidia.com/v1alpha1", "NVIDIADriver")
        assert one["spec"].keys() == RESOURCE_KEYS
        assert one["spec"]["driverType"] == "gpu"
    selectors = [one["spec"]["nodeSelector"] for one in documents]
    assert selectors[0].keys() == selectors[1].keys()
    assert selectors[0] != selectors[1]
    ours = load(BASE, "examples/nvidiadriver.yaml")["driver"]
    assert ours["useNvidiaDriverCRD"] is ours["nvidiaDriverCRD"]["enabled"] is True


def test_module_parameters_are_of_modules_that_take_them_and_the_values_name_their_config_map() -> None:
    config = yaml.safe_load((FOLDER / CONFIG_MAP).read_text())
    kubernetes_validate.validate(config, "1.34", strict=True)
    assert config["metadata"]["name"] == load("examples/module-parameters.yaml")["driver"]["kernelModuleConfig"]["name"]
    assert config["data"].keys() <= {f"nvidia{part}.conf" for part in ("", "-uvm", "-modeset", "-peermem")}
    for text in config["data"].values():
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert lines
        assert all(re.fullmatch(r"\w+=\S+", line) for line in lines)


@pytest.mark.parametrize("name", [BASE, *OVERLAYS])
def test_what_the_operator_does_not_support_with_precompiled_drivers_is_off(name: str) -> None:
    ours = load(BASE, name)
    assert ours["gds"]["enabled"] is ours["gdrcopy"]["enabled"] is False
    assert ours["driver"]["rdma"]["enabled"] is (name == "examples/rdma.yaml")


@pytest.mark.parametrize("name", [BASE, *OVERLAYS])
def test_nothing_is_installed_below_a_read_only_folder(name: str) -> None:
    ours = load(BASE, name)
    assert not ours["toolkit"]["installDir"].startswith("/usr")
    assert ours["cdi"]["enabled"] is True


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_says_one_thing_and_leaves_the_rest_to_the_base(name: str) -> None:
    ours = dict.fromkeys(keys(load(name)))
    assert load(BASE, name) != load(BASE)
    assert "driver.usePrecompiled" not in ours
    assert name.endswith("mirror.yaml") or len(ours) <= 4


def scalars(node: yaml.Node, path: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from scalars(value, f"{path}/{key.value}")
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from scalars(value, f"{path}/-")
    elif isinstance(node, yaml.ScalarNode):
        yield path, node


@pytest.mark.parametrize("name", [BASE, *OVERLAYS, RESOURCES, CONFIG_MAP])
def test_what_looks_like_a_number_is_quoted(name: str) -> None:
    """Versions and label values are strings to the operator and to Kubernetes; 570 unquoted would be a number."""
    for document in yaml.compose_all((FOLDER / name).read_text()):
        numbers = {p: one for p, one in scalars(document) if re.fullmatch(r"[0-9][0-9.]*", one.value)}
        assert {path.rsplit("/", 1)[1] for path in numbers} <= {"version", f"{OS_LABEL}.VERSION_ID"}
        assert all(node.style == '"' for node in numbers.values())


# The chart that checks a cluster

CHART = FOLDER / "smoke-test"
SCRIPT = CHART / "files" / "check-driver.sh"


def rendered(values: dict[str, Any] | None = None, release: str = "smoke") -> dict[str, dict[str, Any]]:
    """The chart's documents by their names, each valid for Kubernetes; Helm 4 renders them."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=release, namespace="gpu")
    documents = [
        document
        for name, text in files.items()
        if not name.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document
    ]
    for document in documents:
        for version in ("1.29", "1.34"):
            kubernetes_validate.validate(document, version, strict=True)
    found = {document["metadata"]["name"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def test_helm_finds_nothing_to_complain_about() -> None:
    report = helm_python.lint(CHART, strict=True)
    assert report["total_charts_linted"] == 1
    assert report["errors"] == []
    assert [one for one in report["messages"] if one["severity"] > 1] == []


def test_helm_complains_about_a_chart_that_is_broken(tmp_path: Path) -> None:
    broken = tmp_path / "chart"
    with helm_python.Chart.load(CHART) as chart:
        chart.save_dir(tmp_path)
    (tmp_path / "gpu-smoke-test").rename(broken)
    template = broken / "templates" / "vector-add.yaml"
    template.write_text(template.read_text().replace("{{- end }}", ""))
    assert helm_python.lint(broken, strict=True)["errors"]


def test_two_jobs_are_run_by_helm_test_one_after_the_other() -> None:
    jobs = rendered()
    assert {name: job["kind"] for name, job in jobs.items()} == {
        "smoke-driver-version": "Job",
        "smoke-vector-add": "Job",
    }
    assert all(job["metadata"]["annotations"]["helm.sh/hook"] == "test" for job in jobs.values())
    weights = [int(job["metadata"]["annotations"]["helm.sh/hook-weight"]) for job in jobs.values()]
    assert weights == sorted(set(weights))
    assert all(job["metadata"]["namespace"] == "gpu" for job in jobs.values())


def test_a_check_gets_one_gpu_and_no_more_rights_than_it_needs() -> None:
    for job in rendered().values():
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["restartPolicy"] == "Never"
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert "runtimeClassName" not in pod
        assert "affinity" not in pod
        assert job["spec"]["activeDeadlineSeconds"] == 600
        assert job["spec"]["backoffLimitPerIndex"] == 0


def test_values_reach_the_pods() -> None:
    digest = f"sha256:{'a' * 64}"
    jobs = rendered(
        {
            "driverVersion": "570",
            "nodes": 3,
            "image": {"repository": "mirror.example.com/sample", "digest": digest, "pullPolicy": "Always"},
            "imagePullSecrets": [{"name": "mirror"}],
            "runtimeClassName": "gvisor",
            "activeDeadlineSeconds": 2000000,
            "vectorAdd": {"command": ["/bin/vectorAdd", "--twice"]},
        }
    )
    for job in jobs.values():
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == f"mirror.example.com/sample@{digest}"
        assert container["imagePullPolicy"] == "Always"
        assert pod["imagePullSecrets"] == [{"name": "mirror"}]
        assert pod["runtimeClassName"] == "gvisor"
        assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
        assert job["spec"]["activeDeadlineSeconds"] == 2000000
        (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart["topologyKey"] == "kubernetes.io/hostname"
        assert apart["labelSelector"]["matchLabels"] == job["spec"]["template"]["metadata"]["labels"]
    version, add = (job["spec"]["template"]["spec"]["containers"][0] for job in jobs.values())
    assert add["command"] == ["/bin/vectorAdd", "--twice"]
    assert version["env"][0] == {"name": "EXPECTED", "value": "570"}
    assert version["command"] == ["/bin/sh", "-c"]
    assert version["args"] == [SCRIPT.read_text()]


def test_without_the_vector_add_only_the_driver_is_checked() -> None:
    assert list(rendered({"vectorAdd": {"enabled": False}})) == ["smoke-driver-version"]


def test_names_and_labels_stay_short_enough_for_kubernetes() -> None:
    for name, job in rendered(release="a" * 53).items():
        assert len(name) <= 63
        assert all(len(value) <= 63 for value in job["spec"]["template"]["metadata"]["labels"].values())


@pytest.mark.parametrize("driver", ["", "570", "570.172", "570.172.08", "1000"])
def test_the_schema_takes_branches_and_versions(driver: str) -> None:
    assert rendered({"driverVersion": driver})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"driverVersion": 570}, "/driverVersion': got number, want string"),
        ({"driverVersion": "latest"}, "/driverVersion'"),
        ({"driverVersion": "570."}, "/driverVersion'"),
        ({"driverVersion": "570-6.12.44"}, "/driverVersion'"),
        ({"nodes": 0}, "/nodes': minimum"),
        ({"nodes": "3"}, "/nodes': got string"),
        ({"image": {"tag": "", "digest": ""}}, "/image'"),
        ({"image": {"digest": "sha256:12"}}, "/image/digest'"),
        ({"image": {"repository": "a@sha256:1"}}, "/image/repository'"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy'"),
        ({"activeDeadlineSeconds": 0}, "/activeDeadlineSeconds'"),
        ({"backoffLimit": -1}, "/backoffLimit'"),
        ({"nodeSelector": {"pool": True}}, "/nodeSelector/pool'"),
        ({"driverversion": "570"}, "additional properties 'driverversion' not allowed"),
    ],
)
def test_the_schema_refuses_what_cannot_be(values: dict[str, Any], said: str) -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmValuesError, match=re.escape(said)):
        chart.render(values)


def test_the_notes_say_how_to_run_it_and_wait_longer_than_a_check_may_take() -> None:
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render({"driverVersion": "570", "activeDeadlineSeconds": 900}, name="smoke", namespace="gpu")
    notes = files["gpu-smoke-test/templates/NOTES.txt"]
    assert "helm test smoke --namespace gpu --timeout 960s" in notes
    assert "driver 570" in notes


def test_what_the_documents_name_is_there() -> None:
    """Files that commands take, examples in the table, and values of the smoke test that commands set."""
    text = (FOLDER / "README.md").read_text()
    root = FOLDER.parent
    named = re.findall(r"--values (helm/[\w./-]+)", text + (root / "README.md").read_text())
    assert named
    assert [name for name in named if not (root / name).is_file()] == []
    linked = set(re.findall(r"\]\((examples/\S+?)\)", text))
    assert linked == {f"examples/{path.name}" for path in FOLDER.glob("examples/*.yaml")}
    smoke = "\n".join(line for line in text.splitlines() if "smoke-test" in line or "runtimeClassName=" in line)
    sets = [helm_python.parse_set_string_values(one) for one in re.findall(r"--set-string ([^ `]+)", smoke)]
    sets += [helm_python.parse_set_string(one) for one in re.findall(r"--set ([^ `]+)", smoke)]
    assert len(sets) == 4
    assert rendered(functools.reduce(merged, sets, {}))


def check_driver(folder: Path, nvidia_smi: str | None, expected: str) -> tuple[int, str]:
    """Run the check's script by the machine's own shell, with a stand-in for nvidia-smi."""
    if nvidia_smi is not None:
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        tool.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-c", SCRIPT.read_text()],
        env={
            "PATH": f"{folder}" if nvidia_smi is None else f"{folder}:{os.defpath}",
            "EXPECTED": expected,
            "NODE_NAME": "n1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


TWO_GPUS = 'case "$1" in --list-gpus) echo "GPU 0: a"; echo "GPU 1: b" ;; *) echo 570.172.08; echo 570.172.08 ;; esac'


@pytest.mark.parametrize("expected", ["", "570", "570.172", "570.172.08"])
def test_the_check_passes_for_the_expected_driver(tmp_path: Path, expected: str) -> None:
    status, said = check_driver(tmp_path, TWO_GPUS, expected)
    assert status == 0, said
    assert "GPU 1: b" in said
    assert f"node n1: driver 570.172.08, expected {expected or 'any'}" in said


@pytest.mark.parametrize(
    ("nvidia_smi", "expected", "reason"),
    [
        (TWO_GPUS, "580", "the driver is 570.172.08, expected one of branch 580"),
        (TWO_GPUS, "57", "expected one of branch 57"),
        (TWO_GPUS, "570.172.0", "expected 570.172.0"),
        (TWO_GPUS, "570.195.03", "the driver is 570.172.08, expected 570.195.03"),
        (None, "570", "no nvidia-smi here"),
        ("exit 0", "570", "nvidia-smi sees no GPU"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "", "version mismatch"),
        ("exit 9", "", "nvidia-smi failed: it said nothing"),
        ("echo No devices were found", "", "gave no driver version, but: No devices were found"),
        ('case "$1" in --list-gpus) exit 1 ;; *) echo 570.172.08 ;; esac', "570", "cannot list the GPUs"),
        ('case "$1" in --list-gpus) ;; *) echo 570.172.08; echo 570.195.03 ;; esac', "570.172.08", "is 570.195.03"),
    ],
)
def test_the_check_fails_with_the_node_and_the_reason(
    tmp_path: Path, nvidia_smi: str | None, expected: str, reason: str
) -> None:
    status, said = check_driver(tmp_path, nvidia_smi, expected)
    assert status == 1
    assert reason in said
    assert "error: node n1: " in said
