"""A check that cannot fail does not count: each specimen is refused, by the check that is there for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from builds import loading, oci, paths, verify
from builds.cache import remove
from builds.engine import Engine
from builds.errors import InfrastructureError, VerificationError
from builds.image import Compiled
from builds.model import MODULES, ModuleType
from builds.oci import Image
from builds.record import Outcome, Record

from .conftest import Built
from .draft import ROOT, Draft, Sound, damage_layer, flip, swap_text, thaw
from .specimens import SPECIMENS, Specimen

PROPRIETARY = ModuleType.PROPRIETARY


@dataclass(frozen=True)
class Bench:
    """The sound image, and a place to hold specimens of it against its plan."""

    built: Built
    sound: Sound
    folder: Path

    def verify(self, image: Image, *groups: str, engine: Engine | None = None) -> Record:
        """The record of an image held against groups of checks, or all; without an engine nothing is run in it."""
        out = self.folder / "out"
        with pytest.raises((VerificationError, InfrastructureError)):
            verify.run(
                self.built.plan,
                self.built.inputs,
                image,
                engine=engine,
                cache=self.built.cache,
                out=out,
                report=self.built.report,
                repeat="pytest tests/integration/test_specimens.py",
                modules=_compiled(self.built),
                kernels=self.built.kernels,
                groups=groups or verify.GROUPS,
            )
        return Record.read(out / "record.json")


def _compiled(built: Built) -> Compiled:
    return {one.id: {kind: built.out / "modules" / one.id / kind for kind in one.modules} for one in built.plan.sets}


@pytest.fixture(scope="module")
def bench(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("specimens")
    means: dict[str, Any] = {"engine": built.engine, "cache": built.cache, "report": built.report}
    verify.reference_module(built.plan, built.set, built.inputs, **means)
    loading.prepare(built.plan, built.set, built.inputs, built.kernels, **means)
    sound = thaw(built.image, built.plan, len(built.inputs.base.layers), folder / "sound")
    yield Bench(built, sound, folder)
    remove(folder)


@pytest.fixture
def layout(bench: Bench) -> Iterator[Path]:
    yield bench.folder / "specimen"
    remove(bench.folder / "specimen")


def failed(record: Record) -> set[str]:
    return {check.name for check in record.of(Outcome.FAILED)}


def test_the_sound_image_passes_all_but_what_must_run(bench: Bench) -> None:
    record = bench.verify(bench.sound.image)
    assert failed(record) == set()
    assert {check.group for check in record.of(Outcome.NOT_RUN)} == {"runtime"}
    assert not record.passed


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name.replace(" ", "-"))
def test_a_specimen_is_refused(specimen: Specimen, bench: Bench, layout: Path) -> None:
    draft = Draft(bench.sound)
    specimen.spoil(draft)
    record = bench.verify(draft.write(layout), specimen.check.partition(".")[0])
    refusing = {check.object for check in record.of(Outcome.FAILED) if check.id == specimen.check}
    assert refusing, f"{specimen.check} lets it pass; what fails: {sorted(failed(record))}"
    assert specimen.thing == "*" or {thing for thing in refusing if thing.endswith(specimen.thing)}
    assert not record.passed
    if specimen.check in ALONE:
        assert {check.id for check in record.of(Outcome.FAILED)} == {specimen.check}


ALONE = {"load.version", "load.unload", "load.taint"}
"""Checks of modules at work whose specimens no other of them refuses."""


def test_modules_of_another_kernel_are_refused(bench: Bench, layout: Path, built_with_rule: Built) -> None:
    """Real ones, compiled for Debian 13's kernel: their CRCs are that kernel's, which the loading one says itself."""
    draft = Draft(bench.sound)
    for name in MODULES:
        foreign = (_compiled(built_with_rule)[built_with_rule.set.id][PROPRIETARY] / f"{name}.ko").read_bytes()
        draft.edit(draft.module(name, "proprietary"), lambda _, foreign=foreign: foreign)  # type: ignore[misc]
    record = bench.verify(draft.write(layout), "modules", "load")
    refusing = failed(record)
    for check in ("vermagic", "crcs", "imports", "bytes"):
        assert f"modules.{check}[{bench.built.set.id}/proprietary/nvidia.ko]" in refusing
    assert not [name for name in refusing if "open/" in name]
    said = {check.object: check.message for check in record.of(Outcome.FAILED) if check.id == "load.modules"}
    assert said.keys() == {f"{bench.built.set.id}/proprietary/{name}.ko" for name in MODULES}
    assert all("disagrees about version of symbol module_layout" in words for words in said.values())


def test_a_plan_of_other_tags_is_refused(bench: Bench) -> None:
    """What a push would set is held against the operator's rule, whatever the planner has computed."""
    tags = tuple(replace(tag, name=tag.name.replace("550-", "-")) for tag in bench.built.plan.tags)
    built = replace(bench.built, plan=replace(bench.built.plan, tags=tags))
    record = replace(bench, built=built).verify(bench.sound.image, "tags")
    assert "tags.plan[branch]" in failed(record)


def test_a_plan_that_is_wrong_about_the_operator_is_refused(bench: Bench) -> None:
    built = replace(bench.built, plan=replace(bench.built.plan, addressable=False))
    record = replace(bench, built=built).verify(bench.sound.image, "tags")
    assert failed(record) == {"tags.addressable"}


def test_an_entry_point_that_always_says_yes_is_refused(bench: Bench, layout: Path) -> None:
    """It takes any argument, and looks alive where it can do nothing."""
    draft = Draft(bench.sound)
    draft.edit(paths.ENTRYPOINT, lambda _: b"#!/bin/sh\nexit 0\n")
    record = bench.verify(draft.write(layout), "runtime", engine=bench.built.engine)
    assert failed(record) == {
        "runtime.help",
        "runtime.init",
        "runtime.peermem",
        *(f"runtime.refuses[{argument}]" for argument in ("command", "argument", "nothing")),
    }


ELSEWHERE = {
    *("runtime.help", "runtime.init", "runtime.refuses", "runtime.loads", "runtime.tools", "runtime.fabric-manager"),
    "runtime.peermem",
    *("tags.plan", "tags.addressable", "layers.diff-ids"),
}
"""Checks that refuse what is spoiled in a test of its own: it must be run, or it is not the image that is wrong."""


def test_every_check_has_something_that_it_must_refuse() -> None:
    assert verify.known_checks() - {specimen.check for specimen in SPECIMENS} == ELSEWHERE


EVERYWHERE: dict[str, Callable[[Draft, str], object]] = {
    "left out": lambda draft, path: draft.delete(path),
    "a bit changed": lambda draft, path: draft.edit(path, lambda data: flip(data, len(data) // 2)),
    "cut short": lambda draft, path: draft.edit(path, lambda data: data[:-1]),
    "a byte more": lambda draft, path: draft.edit(path, lambda data: data + b"x"),
    "executable or not": lambda draft, path: draft.set(path, mode=0o644 if draft.mode(path) == 0o755 else 0o755),
    "renamed": lambda draft, path: draft.set(path, name=path + "x"),
}
"""What can happen to any file."""


@pytest.mark.parametrize("mutation", EVERYWHERE, ids=lambda name: name.replace(" ", "-"))
def test_no_file_can_be_changed(mutation: str, bench: Bench, layout: Path) -> None:
    """Every file above the base, all of them spoiled at once: each is named by a check that fails."""
    draft = Draft(bench.sound)
    files = [path for path in bench.sound.files() if bench.sound.layer_of[path] >= bench.sound.base]
    assert len(files) > 50
    for path in files:
        EVERYWHERE[mutation](draft, path)
    record = bench.verify(draft.write(layout), "modules", "driver-root", "installer")
    named = {check.object for check in record.of(Outcome.FAILED) if check.object}
    assert [path for path in files if not path.endswith(tuple(named))] == []


def test_a_damaged_blob_is_refused(bench: Bench, layout: Path) -> None:
    draft = Draft(bench.sound)
    draft.put(f"{draft.folder}/note")
    image = draft.write(layout)
    damage_layer(image)
    assert "layers.blobs" in failed(bench.verify(image))


def test_a_layer_of_another_content_is_refused(bench: Bench, layout: Path) -> None:
    """The config promises other bytes than the manifest."""
    draft = Draft(bench.sound)
    draft.damaged = True
    draft.config["rootfs"]["diff_ids"][-1] = "sha256:" + "0" * 64
    assert "layers.diff-ids" in failed(bench.verify(draft.write(layout)))


def test_a_missing_blob_is_refused(bench: Bench, layout: Path) -> None:
    image = Draft(bench.sound).write(layout)
    oci.blob_path(layout, image.layers[-1].descriptor.digest).unlink()
    record = bench.verify(image)
    assert "layers.blobs" in failed(record)
    assert not {check.group for check in record.of(Outcome.PASSED)} & {"modules", "driver-root"}


def test_an_image_that_runs_nothing_is_not_passed(bench: Bench, layout: Path) -> None:
    """Without a shell no command can be run: not run, with a reason, is what that is."""
    draft = Draft(bench.sound)
    draft.put("usr/bin/.wh.sh", b"")
    record = bench.verify(draft.write(layout), "runtime", engine=bench.built.engine)
    told = {check.message for check in record.checks if check.group == "runtime"}
    assert {check.outcome for check in record.checks} == {Outcome.NOT_RUN}
    assert len(told) == 1
    assert "runs no command" in told.pop()


def test_tools_that_lack_a_library_or_a_symbol_are_found_by_running_them(bench: Bench, layout: Path) -> None:
    draft = Draft(bench.sound)
    libraries = draft.libraries.removeprefix(f"{ROOT}/")
    version = bench.built.plan.cell.driver
    draft.delete(f"{draft.libraries}/libnvidia-ml.so.1")
    draft.edit(f"{draft.libraries}/libnvidia-encode.so.{version}", swap_text(b"libnvcuvid.so.1", b"libnvcuvid.so.9"))
    image = draft.write(layout)
    record = bench.verify(image, "runtime", engine=bench.built.engine)
    assert failed(record) == {
        "runtime.tools[usr/bin/nvidia-smi]",
        "runtime.tools[usr/bin/nvidia-debugdump]",
        "runtime.loads[usr/bin/nvidia-debugdump]",
        f"runtime.loads[{libraries}/libnvidia-encode.so.{version}]",
    }
    known = {one.id for one in bench.built.engine.client.images.list()}
    assert image.config_descriptor.digest not in known, "an image loaded for its checks goes when they are done"


def test_a_container_that_goes_away_proves_nothing(bench: Bench, layout: Path) -> None:
    """An entry point that ends whatever runs in its container."""
    draft = Draft(bench.sound)
    draft.edit(paths.ENTRYPOINT, lambda _: b"#!/bin/sh\nkill -9 -1\n")
    record = bench.verify(draft.write(layout), "runtime", engine=bench.built.engine)
    gone = {check.id for check in record.of(Outcome.NOT_RUN) if "is gone" in check.message}
    assert {"runtime.refuses", "runtime.init"} <= gone
    assert not {"runtime.help", "runtime.refuses", "runtime.init"} & {check.id for check in record.of(Outcome.PASSED)}
