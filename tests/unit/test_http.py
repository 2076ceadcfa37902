"""What is tried again and for how long, and how a failure is told. Nothing is asked over a network."""

from __future__ import annotations

import email.utils
import time

import pytest
import requests
from urllib3.exceptions import ProtocolError

from builds import http


def answer(status: int, body: bytes = b"", **headers: str) -> requests.Response:
    made = requests.Response()
    made.status_code, made.reason, made._content = status, "Reason", body
    made.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return made


def run(*results: object) -> tuple[object, list[str], list[float]]:
    """Outcome of work that gives these results one after the other, what was said, and the pauses."""
    todo = list(results)
    said: list[str] = []
    pauses: list[float] = []

    def work() -> object:
        result = todo.pop(0)
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, requests.Response)
        return http.check(result).status_code

    again = http.retrying("work", said.append).copy(sleep=pauses.append)
    try:
        return again(work), said, pauses
    except requests.RequestException as error:
        return error, said, pauses


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again(status: int) -> None:
    result, said, pauses = run(answer(status), answer(status), answer(200))
    assert result == 200
    assert pauses == [0.5, 1.0]
    assert said[0] == f"  work: {status} Reason; again in 0.5 s"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413])
def test_a_status_that_stays_is_given_back(status: int) -> None:
    assert run(answer(status)) == (status, [], [])


@pytest.mark.parametrize(
    "error",
    [requests.ConnectionError("cut"), requests.Timeout("slow"), requests.exceptions.ChunkedEncodingError("half")],
)
def test_a_connection_that_fails_is_tried_again_and_then_believed(error: Exception) -> None:
    result, said, pauses = run(*[error] * http.TRIES)
    assert result is error
    assert pauses == [0.5, 1.0, 2.0, 4.0]
    assert len(said) == http.TRIES - 1


def test_a_certificate_that_is_not_trusted_will_not_be_by_waiting() -> None:
    error = requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    assert run(error) == (error, [], [])
    assert http.untrusted(error)


@pytest.mark.parametrize(("asked", "seconds"), [("7", 7.0), ("3600", 60.0), ("nonsense", 0.5)])
def test_the_pause_that_the_server_asks_for_is_kept_within_reason(asked: str, seconds: float) -> None:
    assert run(answer(429, Retry_After=asked), answer(200))[2] == [seconds]


def test_a_pause_may_be_a_date() -> None:
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    (pause,) = run(answer(503, Retry_After=date), answer(200))[2]
    assert 15 < pause <= 20


def test_what_a_registry_says_of_an_error_is_told() -> None:
    said = b'{"errors": [{"code": "UNSUPPORTED", "message": "read only"}]}'
    assert http.status(answer(405, said)) == "405 Reason; UNSUPPORTED: read only"
    assert http.status(answer(405, b"<html>")) == "405 Reason"
    assert http.status(answer(405, b'{"errors": "none"}')) == "405 Reason"


def test_the_systems_own_word_is_what_counts() -> None:
    deep = ConnectionRefusedError(111, "Connection refused")
    error = requests.ConnectionError("HTTPConnectionPool(host='h', port=1): Max retries exceeded")
    error.__cause__ = deep
    assert http.reason(error) == "Connection refused"


def test_what_has_no_word_of_the_systems_is_told_by_its_innermost_cause() -> None:
    error = requests.ConnectionError(ProtocolError("Connection aborted.", RuntimeError("Remote end closed connection")))
    assert http.reason(error) == "Remote end closed connection"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://robot:secret@host/path", "https://host/path"),
        ("https://host/p@th", "https://host/p@th"),
        ("no address at all", "no address at all"),
    ],
)
def test_credentials_are_left_out(text: str, shown: str) -> None:
    assert http.public(text) == shown
