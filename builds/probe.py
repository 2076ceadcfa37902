"""The header probe: tells in seconds which known changes of the kernel's interface a kernel has, before compiling.

Each change of ``breaks.yaml`` has a few lines of C that compile only where the interface still is as some drivers use
it. They are compiled as parts of a module, by the compiler and against the headers of the kmodbuild image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

from . import compile as compiling
from .cache import Cache, key_of, recipe
from .console import Reporter
from .engine import Engine
from .errors import BuildError
from .matrix import Matrix
from .model import ModuleType
from .plan import Inputs, ModuleSet, Plan

FILE = Path(__file__).with_name("breaks.yaml")

_CONTROL, _COMPILES = "control", "#include <linux/module.h>\n"
"""What compiles against any headers: if it does not, it is the compiler that is at fault."""

_RESULT = "broken.json"

_SCRIPT = """\
cd /src
make -k -C "$SYSOUT" M=/src ARCH="$ARCH" ${CROSS_COMPILE:+CROSS_COMPILE="$CROSS_COMPILE"} OBJECTS || true
mkdir /out
for object in OBJECTS; do
    [ ! -e "$object" ] || : >"/out/${object%.o}"
done
"""


@dataclass(frozen=True)
class Break:
    """A change of the kernel's interface that some drivers cannot take."""

    name: str
    driver: str
    """Range of driver versions, as PEP 440 writes ranges."""
    types: tuple[ModuleType, ...]
    reason: str
    source: str
    """C that compiles only where the interface is as it was before."""

    def hits(self, driver: str, module_type: ModuleType) -> bool:
        """Whether modules of this driver and type cannot be compiled for a kernel that has the change."""
        return module_type in self.types and SpecifierSet(self.driver).contains(driver)


@cache
def known() -> tuple[Break, ...]:
    """The changes that are known."""
    return tuple(
        Break(**{**entry, "types": tuple(map(ModuleType, entry["types"]))})
        for entry in yaml.safe_load(FILE.read_text("utf-8"))
    )


def run(
    plan: Plan, of: ModuleSet, inputs: Inputs, *, engine: Engine, cache: Cache, report: Reporter
) -> tuple[Break, ...]:
    """The known changes that a kernel has; compiled once per kernel build and compiler.

    Raises BuildError where the image cannot compile anything at all.
    """

    def build(folder: Path) -> None:
        with report.step("probe headers") as step:
            sources = {f"{one.name}.c": one.source for one in known()} | {f"{_CONTROL}.c": _COMPILES}
            objects = " ".join(name.replace(".c", ".o") for name in sources)
            rules = {"Kbuild": f"obj-m := {objects}\n", "compile.sh": _SCRIPT.replace("OBJECTS", objects)}
            compiling.small(plan, of, inputs, sources | rules, folder, engine=engine, report=report)
            if not (folder / _CONTROL).is_file():
                log = (folder / compiling.LOG).read_text(errors="replace")
                said = compiling.first_error(log)
                raise BuildError("header probe", "nothing compiles against these headers", got=said)
            broken = sorted(one.name for one in known() if not (folder / one.name).is_file())
            (folder / _RESULT).write_text(json.dumps(broken))
            step.note(f"{of.kernel.build.release}: {', '.join(broken) or 'none of the known changes'}")

    key = key_of(kernel=asdict(of.kernel.build), compiler=of.kernel.compiler, recipe=recipe(FILE, Path(__file__)))
    folder, _ = cache.make("probe", key, build)
    names = set(json.loads((folder / _RESULT).read_text()))
    return tuple(one for one in known() if one.name in names)


def check(plan: Plan, of: ModuleSet, found: Iterable[Break], report: Reporter) -> None:
    """Hold a plan against what the probe found.

    Raises BuildError where a type is to be compiled that cannot be; says so where a rule leaves out a type for no
    reason that the probe can see.
    """
    build = of.kernel.build
    for module_type in of.modules:
        if hits := [one for one in found if one.hits(plan.cell.driver, module_type)]:
            raise BuildError(
                f"compile {plan.cell} {module_type}",
                f"kernel {build.release} ({build.package}) has a change that this driver cannot take",
                got="; ".join(f"{one.name}: {one.reason}" for one in hits),
                hint=f"an exclusion rule for kernel {build.version} states the type's absence; the headers were probed",
            )
    for module_type, reason in of.absent.items():
        suspects = [one for one in known() if one.name in reason and one.hits(plan.cell.driver, module_type)]
        if suspects and not any(one in found for one in suspects):
            report.say(
                f"  {module_type}: the rule may be wider than its reason: {build.release} ({build.package}) does not "
                f"have the change {', '.join(one.name for one in suspects)}",
                style="yellow",
            )


def show(of: ModuleSet, found: Iterable[Break], matrix: Matrix, report: Reporter) -> None:
    """Print the known changes, whether a kernel has them, and which drivers of a matrix they break."""
    build, drivers = of.kernel.build, sorted({cell.driver for cell in matrix.cells})
    ruled = {
        (driver, rule.module_type) for driver in drivers for rule in matrix.rules if rule.applies(driver, build.version)
    }
    has = set(found)

    def broken(change: Break) -> Iterator[str]:
        for driver in drivers:
            for kind in change.types:
                if change in has and change.hits(driver, kind):
                    yield f"{driver} {kind}" + ("" if (driver, kind) in ruled else ": no rule says so")

    report.table(
        f"Kernel {build.release} ({build.package})",
        ("change", "is in it", "drivers of the matrix that it breaks"),
        (
            (f"{change.name}: {change.reason}", "yes" if change in has else "no", "\n".join(broken(change)))
            for change in known()
        ),
    )
