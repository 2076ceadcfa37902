"""Driver packages from a site that fails: what is gone on with, what is believed, what is never asked for again."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builds import http as ours
from builds import sources
from builds.cache import Cache
from builds.console import Reporter
from builds.errors import BuildError, ConfigurationError, InfrastructureError
from builds.lab import package
from builds.model import Arch
from builds.sources import Checksum, DriverPackage

from .conftest import ROOT
from .sites import Site, serving

VERSION = "550.1.2"
NAME = f"NVIDIA-Linux-x86_64-{VERSION}.run"
PLACE = f"/{VERSION}/{NAME}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_FIRST_PAUSE", 0.001)


def _made(folder: Path, seed: int) -> bytes:
    """A package in the vendor's form, of some MB that cannot be compressed."""
    tree = folder / str(seed)
    (tree / "kernel").mkdir(parents=True)
    (tree / "kernel/blob").write_bytes(random.Random(seed).randbytes(6_000_000))
    package.write(tree, VERSION, Arch.AMD64, [], folder / f"{seed}.run", lambda _: None)
    return (folder / f"{seed}.run").read_bytes()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Two different packages of one version."""
    folder = tmp_path_factory.mktemp("packages")
    return _made(folder, 1), _made(folder, 2)


@pytest.fixture
def data(packages: tuple[bytes, bytes]) -> bytes:
    return packages[0]


@pytest.fixture
def site(data: bytes) -> Iterator[Site]:
    with serving(Site({PLACE: data})) as running:
        yield running


Get = Callable[..., DriverPackage]


@pytest.fixture
def get(site: Site, tmp_path: Path) -> Get:
    """Ask for the package, from the site, into a cache of the test's own."""

    def ask(*, pin: str | None = None, vouched: bool = False, base: str | None = None) -> DriverPackage:
        cache, base = Cache(tmp_path / "cache"), base or site.url
        return sources.driver_package(base, VERSION, Arch.AMD64, pin, cache, Reporter(), vouched=vouched)

    return ask


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parts(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.part"))


def test_a_cut_download_is_gone_on_with(site: Site, get: Get, data: bytes) -> None:
    site.cuts = [2_500_000, 1_000_000]
    got = get()
    assert got.path.read_bytes() == data
    whole, *rest = site.of(PLACE)
    assert whole.range is None
    assert [one.range is not None and one.if_range == '"1"' for one in rest] == [True, True]
    starts = [int(str(one.range)[6:-1]) for one in rest]
    assert 2_400_000 < starts[0] <= 2_500_000
    assert 900_000 < starts[1] - starts[0] <= 1_000_000


def test_more_cuts_than_tries_do_not_matter_as_long_as_it_goes_on(site: Site, get: Get, data: bytes) -> None:
    site.always_cut = 300_000
    assert len(data) / site.always_cut > ours.TRIES
    assert get().path.read_bytes() == data


def test_a_later_run_goes_on_where_an_earlier_gave_up(site: Site, get: Get, data: bytes, tmp_path: Path) -> None:
    site.always_cut = 0
    site.cuts = [3_000_000]
    with pytest.raises(InfrastructureError, match="cannot be downloaded"):
        get()
    (left,) = _parts(tmp_path)
    size = left.stat().st_size
    assert 0 < size <= 3_000_000
    site.always_cut = None
    site.asked.clear()
    assert get().path.read_bytes() == data
    assert [one.range for one in site.of(PLACE)] == [f"bytes={size}-"]
    assert _parts(tmp_path) == []


def test_a_run_that_was_killed_is_gone_on_with(site: Site, get: Get, data: bytes, tmp_path: Path) -> None:
    site.pause, site.piece = 0.2, 500_000
    code = (
        "import sys; from pathlib import Path; from builds import sources; from builds.cache import Cache;"
        "from builds.console import Reporter; from builds.model import Arch;"
        "sources.driver_package(sys.argv[1], sys.argv[2], Arch.AMD64, None, Cache(Path(sys.argv[3])), Reporter())"
    )
    command = [sys.executable, "-c", code, site.url, VERSION, str(tmp_path / "cache")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as run:
        while not any(part.stat().st_size for part in _parts(tmp_path)):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    site.pause = 0
    assert get().path.read_bytes() == data
    assert site.of(PLACE)[-1].range is not None


def test_a_server_that_cannot_send_a_rest_sends_all_of_it(site: Site, get: Get, data: bytes) -> None:
    site.ranges, site.cuts = False, [2_000_000]
    assert get().path.read_bytes() == data


def test_a_server_without_validators_is_not_asked_for_a_rest(site: Site, get: Get, data: bytes) -> None:
    site.etag, site.cuts = "", [2_000_000]
    assert get().path.read_bytes() == data
    assert [one.range for one in site.of(PLACE)] == [None, None]


def _broken_off(site: Site, get: Get, tmp_path: Path) -> None:
    """Leave 3 MB of the first package."""
    site.cuts, site.always_cut = [3_000_000], 0
    with pytest.raises(InfrastructureError):
        get()
    assert _parts(tmp_path)
    site.always_cut = None
    site.asked.clear()


def test_a_file_that_has_changed_meanwhile_is_begun_anew(
    site: Site, get: Get, packages: tuple[bytes, bytes], tmp_path: Path
) -> None:
    _broken_off(site, get, tmp_path)
    site.files[PLACE], site.etag = packages[1], '"2"'
    assert get().path.read_bytes() == packages[1]
    assert len(site.of(PLACE)) == 1


def test_pieces_of_two_files_are_never_believed(
    site: Site, get: Get, packages: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """The server takes the old validator for the new file: only the checks can tell."""
    _broken_off(site, get, tmp_path)
    assert len(packages[0]) == len(packages[1])
    site.files[PLACE], site.heeds_if_range = packages[1], False
    assert get().path.read_bytes() == packages[1]
    assert [bool(one.range) for one in site.of(PLACE)] == [True, False]


def test_a_file_that_is_shorter_now_is_begun_anew(site: Site, get: Get, data: bytes, tmp_path: Path) -> None:
    """416: there is nothing where the rest should be."""
    _broken_off(site, get, tmp_path)
    site.files[PLACE], site.heeds_if_range = data[:1000], False
    with pytest.raises(BuildError):
        get()
    assert [bool(one.range) for one in site.of(PLACE)] == [True, False]
    site.files[PLACE] = data
    assert get().path.read_bytes() == data


def test_a_download_that_broke_off_after_its_last_byte_is_taken(
    site: Site, get: Get, data: bytes, tmp_path: Path
) -> None:
    _broken_off(site, get, tmp_path)
    (part,) = _parts(tmp_path)
    part.write_bytes(data)
    assert get().path.read_bytes() == data
    assert site.of(PLACE) == []


def test_a_slow_server_is_waited_for(site: Site, get: Get, data: bytes) -> None:
    site.pause, site.piece = 0.02, 200_000
    assert get().path.read_bytes() == data
    assert len(site.of(PLACE)) == 1


def test_a_server_that_keeps_failing_is_an_infrastructure_error(site: Site, get: Get) -> None:
    site.answers[PLACE] = 503, b"busy"
    with pytest.raises(InfrastructureError, match="keeps failing, got 503"):
        get()
    assert len(site.of(PLACE)) == ours.TRIES


@pytest.mark.parametrize("vouched", [True, False])
def test_a_version_that_does_not_exist_is_said_to_be_none(vouched: bool, site: Site, get: Get) -> None:
    del site.files[PLACE]
    with pytest.raises(ConfigurationError, match=r"there is no such driver package, got 404"):
        get(vouched=vouched)


def test_a_web_page_is_refused_and_does_not_stay(site: Site, get: Get, data: bytes) -> None:
    site.files[PLACE] = b"<!DOCTYPE html><title>Access denied</title>"
    with pytest.raises(BuildError, match="a web page"):
        get()
    site.files[PLACE] = data
    assert get().path.read_bytes() == data


# Who vouches for it


def test_what_the_vendor_publishes_is_compared_and_kept(site: Site, get: Get, data: bytes) -> None:
    site.files[f"{PLACE}.sha256sum"] = f"{_sha256(data)}  {NAME}\n".encode()
    assert get(vouched=True).checksum is Checksum.PUBLISHED
    site.answers[""] = 500, b""
    again = get(vouched=True)
    assert (again.checksum, again.sha256) == (Checksum.PUBLISHED, _sha256(data))


def test_another_published_sha256_is_refused(site: Site, get: Get, tmp_path: Path) -> None:
    site.files[f"{PLACE}.sha256sum"] = f"{'0' * 64}  {NAME}\n".encode()
    with pytest.raises(BuildError, match=r"expected sha256 is 0000"):
        get()
    assert not list((tmp_path / "cache").rglob(NAME))


@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html><title>Sign in</title>", "", f"{'0' * 64}  another.run\n", "0123  " + NAME]
)
def test_a_checksum_that_cannot_be_read_is_no_missing_one(text: str, site: Site, get: Get) -> None:
    site.files[f"{PLACE}.sha256sum"] = text.encode()
    with pytest.raises(BuildError, match="sha256sum"):
        get()
    assert site.of(PLACE) == [], "nothing is downloaded that could not be compared"


def test_a_package_that_nobody_vouches_for_is_refused_before_it_is_downloaded(
    site: Site, get: Get, data: bytes
) -> None:
    with pytest.raises(BuildError, match="nobody vouches for its bytes") as caught:
        get(vouched=True)
    assert "PACKAGE_SHA256=optional" in str(caught.value)
    assert get().checksum is Checksum.OWN
    with pytest.raises(BuildError, match="nobody vouches"):
        get(vouched=True)  # that it is in the cache says nothing
    site.files[f"{PLACE}.sha256sum"] = _sha256(data).encode()
    site.asked.clear()
    assert get(vouched=True).checksum is Checksum.PUBLISHED
    assert site.of(PLACE) == []


def test_a_package_that_is_withdrawn_is_vouched_for_by_nobody_though_it_is_in_the_cache(site: Site, get: Get) -> None:
    assert get().checksum is Checksum.OWN
    del site.files[PLACE]
    with pytest.raises(BuildError, match="nobody vouches"):
        get(vouched=True)


def test_a_pin_needs_nobody_else(site: Site, get: Get, data: bytes) -> None:
    assert get(pin=_sha256(data), vouched=True).checksum is Checksum.PINNED
    assert [one.path for one in site.asked] == [PLACE]
    site.answers[""] = 500, b""
    assert get(pin=_sha256(data), vouched=True).checksum is Checksum.PINNED
    with pytest.raises(InfrastructureError):
        get(vouched=True)  # the pin is gone, and with it what it said


def test_another_sha256_than_the_pinned_one_is_refused(get: Get) -> None:
    with pytest.raises(BuildError, match="expected sha256 is ffff"):
        get(pin="f" * 64)


def test_what_is_damaged_in_the_cache_is_downloaded_again(site: Site, get: Get, data: bytes) -> None:
    site.files[f"{PLACE}.sha256sum"] = f"SHA256 ({NAME}) = {_sha256(data).upper()}\n".encode()
    path = get().path
    path.write_bytes(data[:-1] + b"x")
    assert get().path.read_bytes() == data
    assert len(site.of(PLACE)) == 2


def test_a_vendor_that_publishes_another_sha256_later_is_noticed(
    site: Site, get: Get, packages: tuple[bytes, bytes]
) -> None:
    site.files[f"{PLACE}.sha256sum"] = f"{_sha256(packages[0])}  {NAME}\n".encode()
    get().path.unlink()
    site.files |= {PLACE: packages[1], f"{PLACE}.sha256sum": f"{_sha256(packages[1])}  {NAME}\n".encode()}
    with pytest.raises(BuildError, match="another sha256 than that of the file that was downloaded before"):
        get()
    assert get(pin=_sha256(packages[1])).checksum is Checksum.PINNED


def test_a_folder_has_its_checksums_beside_its_files(get: Get, data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mirror" / VERSION / NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    with pytest.raises(BuildError, match="nobody vouches"):
        get(base=str(tmp_path / "mirror"), vouched=True)
    beside = file.with_name(f"{NAME}.sha256sum")
    beside.write_text(f"{_sha256(data)} *{NAME}\n")
    for base in (tmp_path / "mirror", file):
        assert get(base=str(base), vouched=True).checksum is Checksum.PUBLISHED
    beside.write_text(f"{'0' * 64} *{NAME}\n")
    with pytest.raises(BuildError, match="expected sha256 is 0000"):
        get(base=str(file))


def test_a_package_may_be_named_by_its_own_url(site: Site, get: Get, data: bytes) -> None:
    assert get(base=f"{site.url}{PLACE}").path.read_bytes() == data
