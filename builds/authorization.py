"""Who we are to a registry: credentials from where Docker and Podman keep them, and what a registry makes of them.

A registry that wants to know answers 401 with challenges (RFC 9110, WWW-Authenticate): ``Basic`` takes user and
password, ``Bearer`` a token that a token server gives for them (Docker's token authentication, which OCI's
distribution specification refers to). A token is for one scope and some minutes, so each challenge gets a new one.
"""

from __future__ import annotations

import base64
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import docker.auth
import requests
from docker.credentials.errors import StoreError
from docker.errors import DockerException

from . import http
from .errors import ConfigurationError, InfrastructureError

_CLIENT = "gardenlinux-nvidia-builds"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = rf'({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))'
_CHALLENGE = re.compile(rf"({_TOKEN})\s+((?:{_PARAMETER}\s*,?\s*)+)|({_TOKEN})(?=\s*(?:,|$))")


@dataclass(frozen=True)
class Credentials:
    """What somebody logged in with: user and password, or a token that buys others."""

    user: str = ""
    password: str = ""
    identity: str = ""

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def answer(session: requests.Session, registry: str, origin: str, challenges: Iterable[str]) -> str | None:
    """The value of an Authorization header that meets a registry's challenges; None where there is none.

    ``origin`` is where the registry is spoken to. Raises ConfigurationError where credentials cannot be looked up,
    InfrastructureError where they would be sent in clear, and requests' errors where a token server fails.
    """
    asked = parse(challenges)
    known = credentials(registry)
    if "realm" in asked.get("bearer", {}):
        return _token(session, registry, origin, asked["bearer"], known)
    if "basic" in asked and known and known.user:
        return known.basic
    return None


def parse(challenges: Iterable[str]) -> dict[str, dict[str, str]]:
    """The challenges of a response by scheme, in lower case, each with its parameters."""
    found: dict[str, dict[str, str]] = {}
    for line in challenges:
        for match in _CHALLENGE.finditer(line):
            scheme = (match[1] or match[6]).lower()
            parameters = re.findall(_PARAMETER, match[2] or "")
            found.setdefault(
                scheme,
                {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain for name, quoted, plain in parameters},
            )
    return found


def credentials(registry: str) -> Credentials | None:
    """What is kept for a registry: ``REGISTRY_AUTH_FILE``, Docker's configuration and its helpers, Podman's file."""
    named, runtime = os.environ.get("REGISTRY_AUTH_FILE"), os.environ.get("XDG_RUNTIME_DIR")
    podman = [Path(runtime, "containers/auth.json")] if runtime else []
    podman.append(Path(f"/run/containers/{os.getuid()}/auth.json"))
    places = ([named] if named else []) + [None] + [str(path) for path in podman if path.is_file()]
    for place in places:
        try:
            with warnings.catch_warnings(action="ignore"):  # what it warns of it also raises
                kept = docker.auth.load_config(place).resolve_authconfig(registry) or {}
        except (DockerException, StoreError, ValueError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"registry {registry}",
                f"its credentials in {place or 'Docker’s configuration'} cannot be looked up",
                got=str(error)[:200],
                hint=f"docker login {registry}",
            ) from error
        values: Mapping[str, str] = {key.lower(): value for key, value in kept.items() if value}
        if values.keys() & {"username", "identitytoken"}:
            return Credentials(values.get("username", ""), values.get("password", ""), values.get("identitytoken", ""))
    return None


def _token(
    session: requests.Session, registry: str, origin: str, asked: Mapping[str, str], known: Credentials | None
) -> str | None:
    """A token of the server that a challenge names, for what it asks; None where the server does not give one."""
    realm = asked["realm"]
    if known and urlsplit(realm).scheme != "https" and urlsplit(origin).scheme == "https":
        raise InfrastructureError(
            f"registry {registry}", "wants its password sent in clear", got=http.public(realm), hint="do not use it"
        )
    wanted = {name: asked[name] for name in ("service", "scope") if name in asked}
    if known and known.identity:
        form = {**wanted, "grant_type": "refresh_token", "refresh_token": known.identity, "client_id": _CLIENT}
        response = session.post(realm, data=form)
    else:
        headers = {"Authorization": known.basic} if known else {}
        response = session.get(realm, params={**wanted, "client_id": _CLIENT}, headers=headers)
    http.check(response)
    try:
        given = response.json()
        token = given.get("token") or given.get("access_token")
    except (ValueError, AttributeError):
        token = None
    return f"Bearer {token}" if response.status_code == 200 and token else None
