"""The image at work, as far as it goes without a GPU: its tools start, its entry point answers and refuses."""

from __future__ import annotations

import posixpath
import re

import pytest

from builds import kmod, paths
from builds.manifest import Placed

from .conftest import Compare
from .evidence import Expected, may_lack
from .inside import ENDED, Inside

_ROOT = f"/{paths.DRIVER_ROOT}"

_PROBES: dict[str, tuple[list[str], str]] = {
    # Without a GPU it gets as far as asking the driver, by way of libnvidia-ml.
    "nvidia-smi": ([], r"Failed to initialize NVML|NVIDIA-SMI has failed because it couldn't communicate"),
    "nvidia-modprobe": (["--version"], r"nvidia-modprobe:\s+version \d"),
    "nvidia-persistenced": (["--version"], r"nvidia-persistenced:\s+version \d"),
    "nvidia-cuda-mps-control": (["--help"], r"MPS Control"),
    "nvidia-cuda-mps-server": (["--help"], r"MPS Server"),
    "nvidia-debugdump": (["--list"], r"nvmlInit"),
    "nv-fabricmanager": (["--version"], r"version"),
}
"""How a tool shows that it runs where there is no GPU: arguments, and what it says."""
_ANY_PROBE = (["--help"], r"\w")

_LOADERS = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
"""The loader itself, which is listed by its path."""

_LINKER_SAYS = re.compile(r"^\s*(?P<library>\S+) => not found|.*(?P<symbol>undefined symbol|version `.*' not found).*")


@pytest.mark.check("runtime.tools")
def test_tools(program: Placed, inside: Inside, expected: Expected, compare: Compare) -> None:
    """Every tool is found by its name and starts: the loader finds its libraries, and it says what it ought to."""
    name = posixpath.basename(program.dest)
    arguments, wanted = _PROBES.get(name, _ANY_PROBE)
    said = inside.run(name, *arguments)
    excused = [library for library in may_lack(name) if f"{library}: cannot open shared object file" in said.text]
    if excused:
        compare([library for library in excused if library not in expected.elf(program).needed], [])
        return
    said_it = re.search(wanted, said.text)
    compare(
        {"started": said.status not in ENDED, "says": said_it[0] if said_it else said.text.strip()[:300]},
        {"started": True, "says": said_it[0] if said_it else wanted},
    )


@pytest.mark.check("runtime.loads")
def test_loads(elf: Placed, inside: Inside, expected: Expected, compare: Compare) -> None:
    """The image's own loader finds every library and every symbol that it needs, in the right version."""
    loader = next(found for one in expected.programs if (found := _loader(one, expected)))
    trace = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_WARN": "yes", "LD_BIND_NOW": "yes"}
    said = inside.run(loader, f"{_ROOT}/{elf.dest}", env=trace)
    traced = {line.split()[0] for line in said.out.splitlines() if line.strip()}
    compare(sorted(set(expected.elf(elf).needed) - traced - _LOADERS), [], "the loader did not look for these")
    excused = may_lack(posixpath.basename(elf.dest))
    lacking = [
        line.strip()
        for line in said.text.splitlines()
        if (told := _LINKER_SAYS.match(line))
        and told["library"] not in excused
        # what is absent for a reason takes its symbols with it
        and not (told["symbol"] and excused)
    ]
    compare(lacking, [])


@pytest.mark.check("runtime.fabric-manager")
def test_fabric_manager(inside: Inside, expected: Expected, compare: Compare) -> None:
    """It says that it is of the driver's very version, or it would not start on a node; or it is absent by rule."""
    said = inside.run("nv-fabricmanager", "--version")
    version = re.search(r"\d+(?:\.\d+)+", said.text)
    wanted = expected.plan.cell.driver if "fabricmanager" in expected.plan.components else None
    compare(version[0] if version else None, wanted, said.text.strip()[:300])


@pytest.mark.check("runtime.help")
def test_help(inside: Inside, compare: Compare) -> None:
    """It names every command that the operator runs (operator contract, rows 5 and 6)."""
    said = inside.run("nvidia-driver", "--help")
    named = [command for command in _COMMANDS if re.search(rf"^  {command}\b", said.out, re.MULTILINE)]
    compare({"status": said.status, "names": named, "complains": said.err}, _HELPS)


_COMMANDS = ["init", "load", "unload", "reload_nvidia_peermem", "probe_nvidia_peermem"]
_HELPS = {"status": 0, "names": _COMMANDS, "complains": ""}


@pytest.mark.check("runtime.refuses")
@pytest.mark.parametrize("arguments", ["bogus", "init --bogus", ""], ids=["command", "argument", "nothing"])
def test_refuses(arguments: str, inside: Inside, compare: Compare) -> None:
    """An unknown argument is an error (operator contract, row 5)."""
    said = inside.run("nvidia-driver", *arguments.split())
    compare({"failed": said.status not in (0, *ENDED), "reasons": _reasons(said.err)}, _REFUSES, said.text[:300])


@pytest.mark.check("runtime.peermem")
def test_peermem(inside: Inside, compare: Compare) -> None:
    """The container beside the driver's ends with a reason, too, where it cannot work (row 6)."""
    said = inside.run("nvidia-driver", "reload_nvidia_peermem")
    compare({"failed": said.status not in (0, *ENDED), "reasons": _reasons(said.err)}, _REFUSES, said.text[:300])


@pytest.mark.check("runtime.init")
def test_init(inside: Inside, compare: Compare) -> None:
    """Where it cannot work `init` ends at once, with a reason: it must not look alive for 20 minutes (row 8)."""
    said = inside.run("nvidia-driver", "init")
    compare({"failed": said.status not in (0, *ENDED), "reasons": _reasons(said.err)}, _REFUSES, said.text[:300])


_REFUSES = {"failed": True, "reasons": 1}


def _reasons(text: str) -> int:
    """How many lines say why it failed."""
    return sum(line.startswith("nvidia-driver: error: ") for line in text.splitlines())


def _loader(one: Placed, expected: Expected) -> str | None:
    """The loader that a program asks for."""
    return expected.elf(one).interpreter if kmod.is_elf(expected.head(one)) else None
