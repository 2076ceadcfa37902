"""Settings: default < matrix file < environment < option."""

from __future__ import annotations

from pathlib import Path

import pytest

from builds.errors import ConfigurationError
from builds.settings import SETTINGS, resolve


def test_precedence() -> None:
    by_file, by_environment, by_option = {"GL_REGISTRY": "file"}, {"GL_REGISTRY": "environment"}, {"gl_registry": "o"}
    assert resolve(environ={}).gl_registry == "ghcr.io/gardenlinux/gardenlinux"
    assert resolve(by_file, environ={}).gl_registry == "file"
    assert resolve(by_file, environ=by_environment).gl_registry == "environment"
    assert resolve(by_file, by_option, by_environment).gl_registry == "o"


def test_an_empty_variable_is_as_if_it_were_not_set() -> None:
    assert resolve(environ={"GL_REGISTRY": ""}).gl_registry == "ghcr.io/gardenlinux/gardenlinux"


def test_a_matrix_file_may_speak_of_the_cache() -> None:
    settings = resolve({"GL_REGISTRY": "oci:{cache}/images"}, environ={"CACHE_DIR": "/somewhere"})
    assert settings.gl_registry == "oci:/somewhere/images"


def test_kernels_may_be_in_the_cache_or_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(environ={}).kernel_image is None
    assert resolve({"KERNEL_IMAGE": "{cache}/kernels"}, environ={"CACHE_DIR": "/c"}).kernel_image == Path("/c/kernels")
    assert resolve(environ={"KERNEL_IMAGE": "my/vmlinuz"}).kernel_image == tmp_path / "my/vmlinuz"


def test_whether_modules_must_load_is_said_by_file_environment_or_option() -> None:
    assert not resolve(environ={}).must_load
    assert resolve({"LOAD_TEST": "required"}, environ={}).must_load
    assert not resolve({"LOAD_TEST": "required"}, environ={"LOAD_TEST": "optional"}).must_load
    assert resolve({}, {"load_test": "required"}, {"LOAD_TEST": "optional"}).must_load


def test_folders_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(environ={"OUT_DIR": "here"}).out_dir == tmp_path / "here"


@pytest.mark.parametrize("jobs", ["0", "-1", "many", "1.5"])
def test_jobs_must_be_a_number(jobs: str) -> None:
    with pytest.raises(ConfigurationError, match="JOBS"):
        resolve(environ={"JOBS": jobs})


def test_every_setting_is_in_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [row.variable for row in SETTINGS if f"`{row.variable}`" not in readme] == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("IMAGE_PATH", "Foo/Bar"),
        ("IMAGE_PATH", "ghcr.io/a:tag"),
        ("IMAGE_PATH", "ghcr.io/a b"),
        ("LOAD_TEST", "yes"),
        ("LOAD_TEST", "Required"),
        ("KERNEL_IMAGE", "~nobody-of-this-name/vmlinuz"),
        ("CACHE_DIR", "~nobody-of-this-name/cache"),
        ("CACHE_DIR", "out/cache"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=variable):
        resolve(environ={variable: value})
