"""HTTP as registries and download sites need it: time-outs, whom to trust, and another try where that can help."""

from __future__ import annotations

import email.utils
import re
import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import requests
import tenacity
from requests.adapters import HTTPAdapter

TIMEOUT = 60
"""Seconds without an answer, or without a byte of one."""

TRIES = 5
"""How often a request is made before its failure is believed."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds; pauses double, unless the server names one


class _Adapter(HTTPAdapter):
    """Gives every request a time-out (requests itself waits for ever) and the system's trust besides requests' own."""

    def __init__(self, authorities: Iterable[Path]) -> None:
        self._context = ssl.create_default_context()  # the system's store, and what SSL_CERT_FILE names
        for path in authorities:
            self._context.load_verify_locations(path)
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, ssl_context=self._context, **options)

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        return super().proxy_manager_for(*arguments, ssl_context=self._context, **options)

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:  # type: ignore[override]
        return super().send(request, **{**options, "timeout": options.get("timeout") or TIMEOUT})


def prepare(session: requests.Session, authorities: Iterable[Path] = ()) -> requests.Session:
    """Give a session time-outs, and trust in the system's certificate authorities and those of the files named.

    Raises OSError for a file that holds no certificate.
    """
    adapter = _Adapter(authorities)
    for scheme in ("https://", "http://"):
        session.mount(scheme, adapter)
    return session


def check(response: requests.Response) -> requests.Response:
    """The response, unless its status asks for another try: then HTTPError, which :func:`retrying` waits for."""
    if _is_passing(response.status_code):
        raise requests.HTTPError(status(response), response=response)
    return response


def retrying(what: str, say: Callable[[str], None]) -> tenacity.Retrying:
    """Calls a function again, after growing pauses, while it fails in a way that may pass; then raises what it raised.

    That is a connection refused, cut or silent, and an answer that :func:`check` does not take. ``say`` is told of
    each failure and each pause; ``what`` is the work in words.
    """

    def told(state: tenacity.RetryCallState) -> None:
        assert state.outcome
        error = state.outcome.exception()
        say(f"  {what}: {reason(error)}; again in {state.upcoming_sleep:.1f} s")

    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(TRIES),
        wait=_pause,
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=told,
        reraise=True,
    )


def status(response: requests.Response) -> str:
    """Status of a response in words, with what a registry says of it in its body."""
    text = f"{response.status_code} {response.reason}"
    try:
        said = [f"{error['code']}: {error.get('message', '')}" for error in response.json()["errors"]]
    except (ValueError, KeyError, TypeError, requests.RequestException):
        said = []
    return "; ".join([text, *said])[:300]


def untrusted(error: BaseException | None) -> bool:
    """Whether a request failed because the server's certificate is not trusted."""
    return any("CERTIFICATE_VERIFY_FAILED" in str(cause) for cause in _causes(error))


def reason(error: BaseException | None) -> str:
    """Why a request failed, in a few words: requests wraps the system's own word in three layers of its own."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return status(error.response)
    if isinstance(error, requests.Timeout):
        return f"no answer in {TIMEOUT} s"
    causes = list(_causes(error))
    words = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    words = words or [str(cause) for cause in causes if str(cause)]
    text = words[-1] if words else type(error).__name__
    return public(" ".join(text.split()))[:200]


def public(text: str) -> str:
    """A text with the credentials of its URLs left out."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _is_passing(status: int) -> bool:
    """Whether a server may do better soon: too much to do (408, 429), or a failure of its own but "I cannot" (501)."""
    return status in (408, 429) or (status >= 500 and status != 501)


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    """An error and whatever led to it, the deepest last."""
    todo, seen = [error], set()
    while todo:
        cause = todo.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        todo += [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, requests.HTTPError):
        return error.response is not None and _is_passing(error.response.status_code)
    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, passing) and not untrusted(error)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds to wait: what the server asks for (RFC 9110, Retry-After), or twice as long each time."""
    assert state.outcome
    error = state.outcome.exception()
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, requests.HTTPError) else ""
    try:
        if asked.isdecimal():
            return min(float(asked[:9]), _LONGEST_PAUSE)
        if asked and (date := email.utils.parsedate_tz(asked)):
            return min(max(email.utils.mktime_tz(date) - time.time(), 0.0), _LONGEST_PAUSE)
    except (ValueError, OverflowError):
        pass  # it does not mean it
    return float(_FIRST_PAUSE * 2 ** (state.attempt_number - 1))
