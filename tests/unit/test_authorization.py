"""What a registry asks for, and where credentials are looked up. Nobody is asked over a network."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import requests

from builds.authorization import Credentials, answer, credentials, parse
from builds.errors import ConfigurationError, InfrastructureError

BASIC = base64.b64encode(b"robot:pa:ss").decode()


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (['Basic realm="tests"'], {"basic": {"realm": "tests"}}),
        (["Basic"], {"basic": {}}),
        (
            ['Bearer realm="https://a/token",service="reg",scope="repository:gl/driver:pull,push"'],
            {"bearer": {"realm": "https://a/token", "service": "reg", "scope": "repository:gl/driver:pull,push"}},
        ),
        (
            ['Bearer realm="https://a/token"', 'Basic realm="x"'],
            {"bearer": {"realm": "https://a/token"}, "basic": {"realm": "x"}},
        ),
        (
            ['Negotiate, Basic realm="x", Bearer realm="https://a/token", service=reg'],
            {"negotiate": {}, "basic": {"realm": "x"}, "bearer": {"realm": "https://a/token", "service": "reg"}},
        ),
        (["bearer Realm=plain"], {"bearer": {"realm": "plain"}}),
        ([r'Basic realm="say \"who\""'], {"basic": {"realm": 'say "who"'}}),
        ([], {}),
        ([",,,"], {}),
    ],
)
def test_challenges_are_told_apart(lines: list[str], wanted: dict[str, dict[str, str]]) -> None:
    assert parse(lines) == wanted


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's configuration; Podman has none."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker/config.json"


def test_credentials_are_dockers(docker_config: Path) -> None:
    docker_config.write_text(json.dumps({"auths": {"reg.example:5000": {"auth": BASIC}}}))
    assert credentials("reg.example:5000") == Credentials("robot", "pa:ss")
    assert credentials("reg.example") is None
    assert credentials("reg.example:5000").basic == f"Basic {BASIC}"  # type: ignore[union-attr]


def test_credentials_are_podmans_where_docker_has_none(docker_config: Path, tmp_path: Path) -> None:
    podman = tmp_path / "run/containers/auth.json"
    podman.parent.mkdir(parents=True)
    podman.write_text(json.dumps({"auths": {"reg.example": {"auth": BASIC}}}))
    assert credentials("reg.example") == Credentials("robot", "pa:ss")


def test_a_file_that_is_named_goes_first(docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker_config.write_text(json.dumps({"auths": {"reg.example": {"auth": base64.b64encode(b"a:b").decode()}}}))
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"reg.example": {"auth": BASIC}}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    assert credentials("reg.example") == Credentials("robot", "pa:ss")


def test_a_token_that_buys_others_is_one(docker_config: Path) -> None:
    docker_config.write_text(json.dumps({"auths": {"reg.example": {"identitytoken": "buys"}}}))
    assert credentials("reg.example") == Credentials(identity="buys")


@pytest.mark.parametrize(
    "text", ['{"auths": {"reg.example": {"auth": null}}}', '{"credHelpers": {"reg.example": "no-such-helper"}}']
)
def test_what_cannot_be_read_is_said(text: str, docker_config: Path) -> None:
    docker_config.write_text(text)
    with pytest.raises(ConfigurationError, match="docker login"):
        credentials("reg.example")


def test_user_and_password_answer_a_basic_challenge(docker_config: Path) -> None:
    docker_config.write_text(json.dumps({"auths": {"reg.example": {"auth": BASIC}}}))
    asked = ('Basic realm="x"',)
    assert answer(requests.Session(), "reg.example", "https://reg.example", asked) == f"Basic {BASIC}"
    assert answer(requests.Session(), "other.example", "https://other.example", asked) is None


def test_a_password_is_not_sent_in_clear_where_the_registry_is_not(docker_config: Path) -> None:
    docker_config.write_text(json.dumps({"auths": {"reg.example": {"auth": BASIC}}}))
    with pytest.raises(InfrastructureError, match="in clear"):
        answer(requests.Session(), "reg.example", "https://reg.example", ['Bearer realm="http://reg.example/token"'])
