"""Push, against Debian's docker-registry: open, with a password, with TLS, read-only, down, and one that fails."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme

from builds import http, layers, oci, push, registry
from builds.console import Reporter
from builds.errors import InfrastructureError, VerificationError
from builds.layers import Entry
from builds.model import Arch
from builds.oci import Image, Layer
from builds.record import Record
from builds.tags import Tag, TagKind

from .conftest import ROOT, Built, Cli, environment
from .registries import Access, Kind, Proxy, Server, Tokens, docker_config, proxied, put, serve, token_server

REPOSITORY = "gl/driver"
PASSWORD = "correct-horse-7-battery"


@pytest.fixture(scope="module")
def server(registry_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A registry that anybody may use."""
    with serve(registry_binary, tmp_path_factory.mktemp("registry")) as running:
        yield running


# A small image, and every fault at every request of its push.


def _small(folder: Path, text: str, builds: Mapping[str, str] | None = None) -> Image:
    """An image of two layers, a few hundred bytes each; ``builds`` are kernel builds and packages that it names."""
    oci.create(folder)
    made: list[Layer] = []
    for number in range(2):
        blob = folder / "part"
        layer = layers.write_layer([Entry("file", "file", 0o644, f"{text} {number}\n".encode() * 20)], blob)
        blob.rename(oci.blob_path(folder, layer.descriptor.digest))
        made.append(layer)
    named = {"kernel-build": ",".join(builds), "kernel-package": ",".join(builds.values())} if builds else {}
    config = {"Labels": {f"io.gardenlinux.nvidia.{name}": value for name, value in named.items()}}
    return oci.add_image(folder, made, arch=Arch.AMD64, names=["reg/img:1"], config=config, history=["one", "two"])


MOVING = {TagKind.BRANCH: "550-k-os", TagKind.VERSION: "550.1-k-os", TagKind.ALIAS: "550-k-os1"}


def _tags(image: Image) -> tuple[Tag, ...]:
    return (
        *(Tag(kind, name) for kind, name in MOVING.items()),
        Tag(TagKind.IMMUTABLE, f"550.1-k-{image.digest[7:19]}"),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Image]:
    """What a repository has under its tags, and what is to take its place."""
    folder = tmp_path_factory.mktemp("images")
    return _small(folder / "old", "old"), _small(folder / "new", "new")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test can afford."""
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.001)


@pytest.fixture(scope="module")
def proxy(server: Server) -> Iterator[Proxy]:
    with proxied(server.address) as running:
        yield running


def _push(address: str, name: str, image: Image) -> push.Pushed:
    return push.run(image, _tags(image), registry.connect(address, name, Reporter()))


def _is_whole(server: Server, image: Image) -> bool:
    """Whether a registry has every byte of an image, by its disk."""
    blobs = (image.descriptor, image.config_descriptor, *(layer.descriptor for layer in image.layers))
    return all(
        server.blob(blob.digest).is_file()
        and f"sha256:{hashlib.sha256(server.blob(blob.digest).read_bytes()).hexdigest()}" == blob.digest
        for blob in blobs
    )


def _requests(server: Server, proxy: Proxy, images: tuple[Image, Image], name: str) -> list[str]:
    """What a push asks for, when it takes the place of an older image."""
    old, new = images
    _push(server.address, name, old)
    proxy.reset({})
    _push(proxy.address, name, new)
    return list(proxy.seen)


def _renew(server: Server, image: Image) -> None:
    """Let a registry forget the blobs of an image."""
    for blob in (image.config_descriptor, *(layer.descriptor for layer in image.layers)):
        shutil.rmtree(server.blob(blob.digest).parent, ignore_errors=True)


@pytest.mark.usefixtures("quick")
def test_a_push_outlives_every_fault_that_passes(server: Server, proxy: Proxy, images: tuple[Image, Image]) -> None:
    """Each kind of fault, at each request: the push goes on, and ends in the same state."""
    _, new = images
    asked = _requests(server, proxy, images, "passing/none")
    assert len(asked) > 25, "a push that asks for less does not read back what it wrote"
    for kind in Kind:
        for number in range(len(asked)):
            if kind is Kind.DELAY and number % 5:
                continue  # they take their time
            name = f"passing/{kind.name.lower()}-{number}"
            _renew(server, new)
            proxy.reset({number: kind})
            _push(proxy.address, name, new)
            assert len(proxy.seen) >= len(asked)
            tags = server.tags(name)
            assert {tags[tag.name] for tag in _tags(new)} == {new.digest}, f"{kind} at {asked[number]}"
            assert _is_whole(server, new)


@pytest.mark.usefixtures("quick")
def test_after_a_fault_that_stays_no_tag_means_what_was_not_verified_and_a_repeat_ends_well(
    server: Server, proxy: Proxy, images: tuple[Image, Image], record_property: Callable[[str, object], None]
) -> None:
    old, new = images
    asked = _requests(server, proxy, images, "staying/none")
    left: Counter[str] = Counter()
    for kind in set(Kind) - {Kind.DELAY}:
        for number in range(len(asked)):
            if kind is Kind.HALF_ANSWER and not asked[number].startswith("GET"):
                continue  # these answers have no body that could break off
            name = f"staying/{kind.name.lower()}-{number}"
            _push(server.address, name, old)
            before = server.tags(name)
            _renew(server, new)
            proxy.reset({number: kind}, lasting=True)
            ended = "outlived"  # an upload whose answer is lost is found to be done
            try:
                _push(proxy.address, name, new)
            except InfrastructureError:
                ended = "failed"
            tags = server.tags(name)
            moved = [tag for tag in MOVING.values() if tags[tag] != before[tag]]
            assert {tags[tag] for tag in moved} <= {new.digest}
            if new.digest in tags.values():
                assert _is_whole(server, new), f"{kind} at {asked[number]}"
            assert ended == "failed" or len(moved) == len(MOVING)
            left[f"{ended}, {len(moved)} of {len(MOVING)} moving tags set"] += 1
            done = _push(server.address, name, new)
            tags = server.tags(name)
            assert {tags[tag.name] for tag in _tags(new)} == {new.digest}
            assert {move.tag for move in done.moves if move.old != move.new} >= set(MOVING.values()) - set(moved)
    record_property("left", dict(left))
    for number in range(len(MOVING) + 1):
        assert left[f"failed, {number} of {len(MOVING)} moving tags set"], f"no push failed at that stage: {left}"
    print(dict(left))


def test_a_repeated_push_writes_nothing(server: Server, proxy: Proxy, images: tuple[Image, Image]) -> None:
    _, new = images
    _push(server.address, "twice", new)
    proxy.reset({})
    done = _push(proxy.address, "twice", new)
    assert done.uploaded == 0
    assert {(move.old, move.new) for move in done.moves} == {(new.digest, new.digest)}
    assert {request.split()[0] for request in proxy.seen} == {"HEAD", "GET"}
    assert not [request for request in proxy.seen if request.startswith("GET") and "/blobs/" in request]


def test_blobs_that_are_there_are_not_sent_again(server: Server, proxy: Proxy, images: tuple[Image, Image]) -> None:
    """They are read back all the same: nobody knows yet who put them there."""
    _, new = images
    _push(server.address, "shared", new)
    proxy.reset({})
    done = push.run(new, [Tag(TagKind.BRANCH, "551-k-os")], registry.connect(proxy.address, "shared", Reporter()))
    assert done.uploaded == 0
    assert sum(request.startswith("GET") and "/blobs/" in request for request in proxy.seen) == 3


@pytest.mark.usefixtures("quick")
def test_a_blob_that_the_registry_has_damaged_stops_the_push_before_any_tag(server: Server, tmp_path: Path) -> None:
    image = _small(tmp_path / "image", "damaged there")
    _push(server.address, "before", image)
    blob = server.blob(image.layers[0].descriptor.digest)
    data = blob.read_bytes()
    other = registry.connect(server.address, "before", Reporter())
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InfrastructureError, match="holds other bytes"):
        push.run(image, [Tag(TagKind.BRANCH, "552-k-os"), Tag(TagKind.IMMUTABLE, "552-k-1")], other)
    assert not {"552-k-os", "552-k-1"} & server.tags("before").keys()


def test_the_tag_that_nodes_follow_is_set_last(server: Server, images: tuple[Image, Image]) -> None:
    _, new = images
    done = _push(server.address, "order", new)
    kinds = {tag.name: tag.kind for tag in _tags(new)}
    assert [kinds[move.tag] for move in done.moves] == [
        TagKind.IMMUTABLE,
        TagKind.ALIAS,
        TagKind.VERSION,
        TagKind.BRANCH,
    ]


def test_no_tag_loses_a_kernel_build_that_its_nodes_run(server: Server, tmp_path: Path) -> None:
    """Two releases with different builds of one kernel name follow one tag: the last push must not win."""
    first, second = {"a" * 64: "6.12.60-3gl0"}, {"b" * 64: "6.12.60-3gl2"}
    old, new = _small(tmp_path / "old", "old", first), _small(tmp_path / "new", "new", second)
    both = _small(tmp_path / "both", "both", first | second)
    _push(server.address, "builds", old)
    before = server.tags("builds")
    with pytest.raises(VerificationError, match="has modules for kernel builds that this image lacks") as caught:
        _push(server.address, "builds", new)
    assert "6.12.60-3gl0 there, 6.12.60-3gl2 here" in str(caught.value)
    assert server.tags("builds") == before
    _push(server.address, "builds", both)
    with pytest.raises(VerificationError, match="kernel builds"):
        _push(server.address, "builds", old)
    push.run(new, _tags(new), registry.connect(server.address, "builds", Reporter()), drop_builds=True)
    assert server.tags("builds")[MOVING[TagKind.BRANCH]] == new.digest


# The image of the default cell, as a user pushes it.


@pytest.fixture
def copy(verified: Built, tmp_path: Path) -> Path:
    """A copy of its output folder, to be spoiled; blobs are hard links."""
    target = tmp_path / "out" / str(verified.cell)
    shutil.copytree(verified.out, target, copy_function=os.link)
    return target


def _place(server: Server, name: str) -> dict[str, str]:
    return {"IMAGE_PATH": f"{server.address}/{name}"}


def test_an_image_is_pushed_repeated_and_verified_from_the_registry(
    server: Server, verified: Built, builds: Cli, tmp_path: Path
) -> None:
    place = _place(server, REPOSITORY)
    done = builds("push", str(verified.cell), env=place)
    assert done.returncode == 0, done.stderr
    wanted = {tag.name: verified.image.digest for tag in verified.plan.tags}
    assert server.tags(REPOSITORY) == wanted
    for tag in wanted:
        assert f"{tag}: new → {verified.image.digest}" in done.stderr
    told = json.loads((verified.out / "push.json").read_text())
    assert told["digest"] == verified.image.digest
    assert told["uploaded"] == verified.image.size - verified.image.descriptor.size
    assert {move["tag"]: move["new"] for move in told["moves"]} == wanted

    done = builds("push", str(verified.cell), env=place)
    assert done.returncode == 0, done.stderr
    assert "unchanged" in done.stderr
    assert json.loads((verified.out / "push.json").read_text())["uploaded"] == 0

    reference = f"{server.address}/{REPOSITORY}:{verified.plan.tags[0].name}"
    out = {**place, "OUT_DIR": str(tmp_path)}
    done = builds("verify", "--image", reference, env=out)
    assert done.returncode == 0, done.stderr
    (left,) = tmp_path.glob("image-*")
    record = Record.read(left / "record.json")
    assert record.passed
    assert record.digest == verified.image.digest
    assert record.repeat == f"nox -s verify -- --image {reference}@{record.digest} --cell {verified.cell}"


def test_nothing_is_pushed_without_a_name_and_a_password_and_they_show_nowhere(
    registry_binary: Path, verified: Built, builds: Cli, tmp_path: Path
) -> None:
    with serve(registry_binary, tmp_path / "registry", Access("robot", PASSWORD)) as server:
        place = _place(server, REPOSITORY)
        good = docker_config(tmp_path / "good", server.address, "robot", PASSWORD)
        wrong = docker_config(tmp_path / "wrong", server.address, "robot", "wrong-" + PASSWORD)
        for folder in (tmp_path / "none", wrong):
            done = builds("push", str(verified.cell), env={**place, "DOCKER_CONFIG": str(folder)})
            assert done.returncode == 5, done.stderr
            assert f"docker login {server.address}" in done.stderr
            assert "Traceback" not in done.stderr
            assert PASSWORD not in done.stderr
            assert server.tags(REPOSITORY) == {}

        seen: set[str] = set()
        with subprocess.Popen(
            [sys.executable, "-m", "builds", "push", str(verified.cell)],
            cwd=ROOT,
            env=environment(**place, OUT_DIR=str(verified.out.parent), DOCKER_CONFIG=str(good)),
            stderr=subprocess.PIPE,
            text=True,
        ) as run:
            while run.poll() is None:
                for process in psutil.process_iter(["cmdline"]):
                    seen |= set(process.info["cmdline"] or ())
                time.sleep(0.05)
            assert run.stderr
            said = run.stderr.read()
        assert run.returncode == 0, said
        assert len(server.tags(REPOSITORY)) == len(verified.plan.tags)
        texts = [said, *seen, *(path.read_text(errors="replace") for path in _texts(verified.out))]
        assert "builds" in seen
        assert not [text for text in texts if PASSWORD in text]


def _texts(folder: Path) -> list[Path]:
    """Everything that a run leaves but the image and the modules."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".xml", ".log")]


def test_a_credential_helper_is_asked(registry_binary: Path, verified: Built, builds: Cli, tmp_path: Path) -> None:
    with serve(registry_binary, tmp_path / "registry", Access("robot", PASSWORD)) as server:
        helper = tmp_path / "bin" / "docker-credential-tests"
        helper.parent.mkdir()
        answer = json.dumps({"ServerURL": server.address, "Username": "robot", "Secret": PASSWORD})
        helper.write_text(f"#!/bin/sh\nread -r asked\n[ \"$asked\" = {server.address} ] && echo '{answer}'\n")
        helper.chmod(0o755)
        config = tmp_path / "config"
        config.mkdir()
        (config / "config.json").write_text(json.dumps({"credHelpers": {server.address: "tests"}}))
        path = f"{helper.parent}:{os.environ['PATH']}"
        done = builds(
            "push", str(verified.cell), env={**_place(server, REPOSITORY), "DOCKER_CONFIG": str(config), "PATH": path}
        )
        assert done.returncode == 0, done.stderr
        assert len(server.tags(REPOSITORY)) == len(verified.plan.tags)


def test_a_registry_of_tokens_gives_one_for_each_thing_that_is_done(
    registry_binary: Path, verified: Built, builds: Cli, tmp_path: Path
) -> None:
    """As public registries do: a token to ask is none to push, and each is good for a moment only."""
    with (
        token_server(Tokens("robot", PASSWORD, seconds=1)) as tokens,
        serve(registry_binary, tmp_path / "registry", Access(tokens=tokens)) as server,
    ):
        good = docker_config(tmp_path / "good", server.address, "robot", PASSWORD)
        wrong = docker_config(tmp_path / "wrong", server.address, "robot", "wrong-" + PASSWORD)
        place = _place(server, REPOSITORY)
        for folder in (wrong, tmp_path / "none"):
            done = builds("push", str(verified.cell), env={**place, "DOCKER_CONFIG": str(folder)})
            assert done.returncode == 5, done.stderr
            assert f"docker login {server.address}" in done.stderr
            assert PASSWORD not in done.stderr
            assert "Traceback" not in done.stderr
        assert tokens.scopes == []
        done = builds("push", str(verified.cell), env={**place, "DOCKER_CONFIG": str(good)})
        assert done.returncode == 0, done.stderr
        assert len(server.tags(REPOSITORY)) == len(verified.plan.tags)
        assert f"repository:{REPOSITORY}:pull" in tokens.scopes
        assert {scope for scope in tokens.scopes if "push" in scope}
        reference = f"{server.address}/{REPOSITORY}:{verified.plan.tags[0].name}"
        env = {**place, "DOCKER_CONFIG": str(good), "OUT_DIR": str(tmp_path / "out")}
        done = builds("verify", "--image", reference, env=env)
        assert done.returncode == 0, done.stderr


def test_a_certificate_must_be_trusted(registry_binary: Path, verified: Built, builds: Cli, tmp_path: Path) -> None:
    with serve(registry_binary, tmp_path / "registry", Access(authority=trustme.CA())) as server:
        place = {**_place(server, REPOSITORY), "CACHE_DIR": str(verified.cache.root)}
        done = builds("push", str(verified.cell), env=place)
        assert done.returncode == 5, done.stderr
        assert "certificate is not trusted" in done.stderr
        assert f"certs.d/{server.address}/ca.crt" in done.stderr
        assert server.tags(REPOSITORY) == {}

        authority = tmp_path / "registry" / "ca.pem"
        done = builds("push", str(verified.cell), env={**place, "SSL_CERT_FILE": str(authority)})
        assert done.returncode == 0, done.stderr

        trusted = tmp_path / "home/.config/containers/certs.d" / server.address / "ca.crt"
        trusted.parent.mkdir(parents=True)
        trusted.write_bytes(authority.read_bytes())
        elsewhere = {**place, "IMAGE_PATH": f"{server.address}/other/driver", "HOME": str(tmp_path / "home")}
        done = builds("push", str(verified.cell), env=elsewhere)
        assert done.returncode == 0, done.stderr
        assert len(server.tags("other/driver")) == len(verified.plan.tags)

        trusted.write_text("no certificate")
        done = builds("push", str(verified.cell), env=elsewhere)
        assert done.returncode == 2, done.stderr
        assert "certificate authority" in done.stderr


def test_a_read_only_registry_is_said_to_be_one(
    registry_binary: Path, verified: Built, builds: Cli, tmp_path: Path
) -> None:
    with serve(registry_binary, tmp_path / "registry", Access(read_only=True)) as server:
        done = builds("push", str(verified.cell), env=_place(server, REPOSITORY))
        assert done.returncode == 5, done.stderr
        assert "405" in done.stderr
        assert "read-only" in done.stderr
        assert server.tags(REPOSITORY) == {}


def test_a_registry_that_is_down_is_said_to_be_so(verified: Built, builds: Cli) -> None:
    done = builds("push", str(verified.cell), env={"IMAGE_PATH": "127.0.0.1:9/gl/driver"})
    assert done.returncode == 5, done.stderr
    assert "cannot be reached" in done.stderr
    assert "Connection refused" in done.stderr
    assert "again in" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_push_that_is_killed_while_it_sends_is_finished_by_the_next(
    server: Server, verified: Built, builds: Cli
) -> None:
    with proxied(server.address, seconds=30) as slow:
        slow.reset(dict.fromkeys(range(8, 40), Kind.DELAY))  # after the questions, while the blobs are sent
        with subprocess.Popen(
            [sys.executable, "-m", "builds", "push", str(verified.cell)],
            cwd=ROOT,
            env=environment(IMAGE_PATH=f"{slow.address}/killed/driver", OUT_DIR=str(verified.out.parent)),
            stderr=subprocess.DEVNULL,
        ) as run:
            while len(slow.seen) <= 8 and run.poll() is None:
                time.sleep(0.05)
            time.sleep(0.5)
            assert run.poll() is None
            os.kill(run.pid, signal.SIGKILL)
    assert server.tags("killed/driver") == {}
    done = builds("push", str(verified.cell), env=_place(server, "killed/driver"))
    assert done.returncode == 0, done.stderr
    assert set(server.tags("killed/driver").values()) == {verified.image.digest}


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a record; a new file, because the old one is shared."""

    def apply(folder: Path) -> None:
        record = json.loads((folder / "record.json").read_text())
        change(record)
        (folder / "record.json").unlink()
        (folder / "record.json").write_text(json.dumps(record))

    return apply


def _fail(record: dict[str, Any]) -> None:
    record["checks"][0] |= {"outcome": "failed", "found": "something else"}
    record["passed"] = False


def _empty(folder: Path) -> None:
    (folder / "record.json").unlink()
    (folder / "record.json").write_text("{}")


def _damage(folder: Path) -> None:
    largest = max((folder / "image/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.unlink()
    largest.write_bytes(data)


REFUSED: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "never verified": (lambda folder: (folder / "record.json").unlink(), "it was not verified"),
    "no image": (lambda folder: shutil.rmtree(folder / "image"), "it has no image"),
    "a check failed": (_edit(_fail), "its verification did not pass"),
    "a check was not run": (
        _edit(lambda record: (record["checks"][-1].update(outcome="not run"), record.update(passed=False))),
        "its verification did not pass",
    ),
    "another image's record": (
        _edit(lambda record: record.update(digest="sha256:" + "a" * 64)),
        "its record is about another image",
    ),
    "a verdict made up": (
        _edit(lambda record: record["checks"][0].update(found="something else")),
        "cannot have passed",
    ),
    "a failed check left out": (
        _edit(lambda record: record.update(checks=[c for c in record["checks"] if c["id"] != "modules.crcs"])),
        "its record lacks checks",
    ),
    "a group left out": (
        _edit(lambda record: record.update(checks=[c for c in record["checks"] if not c["id"].startswith("runtime")])),
        "its record lacks checks",
    ),
    "other checks": (
        _edit(lambda record: record["tools"].update(checks="0" * 64)),
        "its record was made by other checks than these",
    ),
    "older checks": (
        _edit(lambda record: record["tools"].update(checks="0" * 64, harness="0.0.1")),
        "its record was made by other checks than these",
    ),
    "not a record": (_empty, "is not a verification record"),
    "damaged since": (_damage, "its layout is not what was verified"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_proven_is_not_pushed(case: str, copy: Path, server: Server, verified: Built, builds: Cli) -> None:
    spoil, says = REFUSED[case]
    spoil(copy)
    name = f"refused/{case.replace(' ', '-').replace(chr(39), '')}"
    done = builds("push", str(verified.cell), env={**_place(server, name), "OUT_DIR": str(copy.parent)})
    assert done.returncode == 4, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert server.tags(name) == {}


def test_a_record_of_newer_checks_lets_an_image_through(
    copy: Path, server: Server, verified: Built, builds: Cli
) -> None:
    _edit(lambda record: record["tools"].update(checks="0" * 64, harness="99.0"))(copy)
    env = {**_place(server, "newer/driver"), "OUT_DIR": str(copy.parent)}
    done = builds("push", str(verified.cell), env=env)
    assert done.returncode == 0, done.stderr


def test_an_immutable_tag_is_never_moved(
    server: Server, verified: Built, builds: Cli, images: tuple[Image, Image]
) -> None:
    foreign = images[0]
    immutable = next(tag.name for tag in verified.plan.tags if not tag.moves)
    put(f"http://{server.address}/v2/immutable/driver", foreign, immutable)
    done = builds("push", str(verified.cell), env=_place(server, "immutable/driver"))
    assert done.returncode == 4, done.stderr
    assert f"the immutable tag {immutable}" in done.stderr
    assert server.tags("immutable/driver") == {immutable: foreign.digest}


def test_a_moving_tag_is_said_to_move(
    server: Server, verified: Built, builds: Cli, images: tuple[Image, Image]
) -> None:
    branch = verified.plan.tags[0].name
    put(f"http://{server.address}/v2/moving/driver", images[0], branch)
    done = builds("push", str(verified.cell), env=_place(server, "moving/driver"))
    assert done.returncode == 0, done.stderr
    assert f"{branch}: {images[0].digest} → {verified.image.digest}" in done.stderr
    assert server.tags("moving/driver")[branch] == verified.image.digest


def test_a_lab_cell_does_not_go_among_those_of_garden_linux(verified: Built, builds: Cli) -> None:
    done = builds("push", str(verified.cell))
    assert done.returncode == 2, done.stderr
    assert "IMAGE_PATH=<registry>/<repository>" in done.stderr


def test_a_record_lets_only_its_own_image_through(verified: Built) -> None:
    record = Record.read(verified.out / "record.json")
    assert push.admit(record, verified.image, "").cell == verified.cell
    assert record.passed
    assert not replace(record, checks=()).passed
