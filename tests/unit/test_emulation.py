"""Whether programs of another architecture run is found out by running one: the very program, and what is said."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from builds import emulation, engine
from builds.model import Arch

HERE = next((arch for arch in Arch if arch.machine == os.uname().machine), None)


@pytest.mark.parametrize("arch", Arch)
def test_the_program_is_an_elf_of_its_architecture_that_needs_nothing(arch: Arch) -> None:
    elf = ELFFile(io.BytesIO(emulation.program(arch)))
    assert (elf["e_machine"], elf["e_type"]) == (arch.elf_machine, "ET_EXEC")
    (segment,) = elf.iter_segments()
    assert segment["p_type"] == "PT_LOAD"
    entry = elf["e_entry"] - segment["p_vaddr"]
    assert 0 < entry < segment["p_filesz"] == len(emulation.program(arch))


@pytest.mark.skipif(HERE is None, reason="a machine of neither architecture")
def test_the_program_of_this_machine_ends_well_in_a_root_of_its_own(tmp_path: Path) -> None:
    assert HERE
    path = tmp_path / "program"
    path.write_bytes(emulation.program(HERE))
    path.chmod(0o755)
    assert subprocess.run([path], check=False).returncode == 0
    assert emulation.host_runs(HERE)


@pytest.mark.parametrize("arch", Arch)
def test_the_image_that_tries_an_engine_out_holds_the_program_and_says_its_architecture(arch: Arch) -> None:
    with tarfile.open(fileobj=io.BytesIO(engine._probe(arch, "name:1"))) as outer:
        files = {member.name: outer.extractfile(member).read() for member in outer}  # type: ignore[union-attr]
    (manifest,) = json.loads(files["manifest.json"])
    assert manifest["RepoTags"] == ["name:1"]
    assert json.loads(files[manifest["Config"]])["architecture"] == arch
    with tarfile.open(fileobj=io.BytesIO(files[manifest["Layers"][0]])) as layer:
        (member,) = layer
        program = layer.extractfile(member)
        assert program and program.read() == emulation.program(arch)
        assert member.mode == 0o755
