"""HTTP as registries and download sites need it: time-outs, and another try where that can help."""

from __future__ import annotations

from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

TIMEOUT = 60
"""Seconds without an answer, or without a byte of one."""

_AGAIN = Retry(
    total=3,
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=("GET", "HEAD"),
    raise_on_status=False,  # the last answer says more than "too many tries"
)


class _Adapter(HTTPAdapter):
    """Gives every request a time-out: requests itself waits for ever."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:  # type: ignore[override]
        return super().send(request, **{**options, "timeout": options.get("timeout") or TIMEOUT})


def prepare(session: requests.Session) -> requests.Session:
    """Let a session try again after a refused connection, 429 and 5xx, with growing pauses of some seconds in all."""
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter(max_retries=_AGAIN))
    return session
