"""Compile: the kernel modules of one type, from the driver tree, in the kmodbuild container without network.

The vendor's own build files do the work (``make modules``); its interactive installer is never run.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from . import engine as engines
from . import oci, recipes, runfile, userspace
from .cache import Cache, is_whole, key_of, publish
from .console import Reporter
from .engine import Engine, Execution
from .errors import BuildError
from .model import MODULES, Arch, ModuleType
from .plan import Inputs, ModuleSet, Plan

LOG = "build.log"
"""The build log, beside the modules."""

_KEY = "key"
"""Key of the modules, beside them: says which plan they are of wherever the folder is taken."""

_UNIT = re.compile(r"^\s*(CC|LD|CONFTEST:|MODPOST|AR)\b")
_ERROR = re.compile(r"(:\d+:\d+: (fatal )?error: |^ERROR: |: error: |\*\*\* .*Stop)")


def driver_tree(plan: Plan, inputs: Inputs, cache: Cache, report: Reporter) -> Path:
    """The driver package unpacked, once per package.

    Raises BuildError for one that cannot make a user space: better now than after minutes of compiling.
    """

    def unpack(folder: Path) -> None:
        with report.step("unpack driver package"):
            header = runfile.read_header(inputs.package)
            with report.bytes("unpack", None) as advance:
                runfile.unpack(inputs.package, header, folder, progress=advance)
            userspace.selection(folder, {}, plan.cell.arch)

    key = key_of(package=plan.package.sha256, recipe=recipes.DRIVER_TREE)
    return cache.make("driver", key, unpack, proven=True)[0]


def modules(
    plan: Plan,
    of: ModuleSet,
    inputs: Inputs,
    module_type: ModuleType,
    *,
    engine: Engine,
    cache: Cache,
    jobs: int,
    logs: Path,
    report: Reporter,
) -> Path:
    """Folder with the five stripped modules of a type and the build log; compiled if no earlier run did.

    Raises BuildError with the first error of the compiler, the log and the command that repeats the build.
    """

    def build(folder: Path) -> None:
        with report.step(f"compile {module_type}") as step:
            _compile(plan, of, inputs, module_type, folder, engine, cache, jobs, logs, report)
            step.note(f"{len(MODULES)} modules for {of.kernel.build.release} ({of.kernel.build.package})")

    made, _ = cache.make(
        "modules",
        of.modules[module_type],
        build,
        waiting=lambda: report.say(f"  waiting for another run that compiles {module_type}"),
        proven=True,
    )
    return made


def load_kmodbuild(engine: Engine, image: oci.Image, report: Reporter) -> str:
    """Load a kmodbuild image into the engine; its name there."""
    name = f"gardenlinux-nvidia-builds/kmodbuild:{image.digest[7:19]}"
    engines.load(engine, image, [name], report)
    return name


def way(of: ModuleSet, inputs: Inputs, engine: Engine) -> str:
    """How modules are compiled in a set's kmodbuild image, in a few words.

    Raises InfrastructureError where the engine does not run the image's programs, with what makes it.
    """
    runs_on = Arch(inputs.sets[of.id].kmodbuild.config["architecture"])
    how = engines.execution(engine, runs_on)
    if how is Execution.EMULATED:
        return f"emulated: the compiler is a program for {runs_on}, which takes some 20 times as long"
    return f"cross-compiled by {of.kernel.cross}gcc on {runs_on}" if of.kernel.cross else "native"


def small(
    plan: Plan,
    of: ModuleSet,
    inputs: Inputs,
    sources: Mapping[str, str],
    folder: Path,
    *,
    engine: Engine,
    report: Reporter,
) -> None:
    """Compile a few sources of ours in a set's kmodbuild container; what their ``compile.sh`` leaves in ``/out``, and
    the log, come to ``folder``. Raises BuildError with the compiler's first error.
    """
    image = load_kmodbuild(engine, inputs.sets[of.id].kmodbuild, report)
    log = folder / LOG
    with engines.container(engine, image, ["/bin/sh", "/src/compile.sh"], environment=_variables(plan, of)) as made:
        for name, text in sources.items():
            engines.put_file(made, f"/src/{name}", text.encode())
        if status := engines.run(made, log):
            raise BuildError(
                f"compile for {of.kernel.build.release}",
                f"the build ended with status {status}",
                got=first_error(log.read_text(errors="replace")),
            )
        engines.get_tree(made, "/out", folder)


def _variables(plan: Plan, of: ModuleSet) -> dict[str, str]:
    """What a build in the kmodbuild container is told of kernel and compiler, in the words of the kernel's Makefile.

    The headers may say so too, but the vendor's Makefile takes for the target what ``uname -m`` says.
    """
    kernel = of.kernel
    told = {"ARCH": plan.cell.arch.kbuild, "SYSSRC": kernel.source, "SYSOUT": kernel.output}
    return {**told, "CROSS_COMPILE": kernel.cross} if kernel.cross else told


def _compile(
    plan: Plan,
    of: ModuleSet,
    inputs: Inputs,
    module_type: ModuleType,
    folder: Path,
    engine: Engine,
    cache: Cache,
    jobs: int,
    logs: Path,
    report: Reporter,
) -> None:
    repeat = f'nox -s "build-driver({plan.cell})"'
    report.say(f"  {module_type}: {way(of, inputs, engine)}")
    sources = driver_tree(plan, inputs, cache, report) / module_type.source_folder
    if not (sources / "Makefile").is_file():
        raise BuildError(
            f"driver package {plan.package.name}",
            f"has no {module_type} modules, and no rule of the matrix says so",
            got=f"no {module_type.source_folder}/Makefile",
            hint="an exclusion rule states a type's absence and its reason",
        )
    image = load_kmodbuild(engine, inputs.sets[of.id].kmodbuild, report)
    log = logs / f"compile-{of.id}-{module_type}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"# {plan.cell} {module_type}; repeat: {repeat}\n")
    conftest = _conftest_key(plan, of, sources)
    environment = {
        **_variables(plan, of),
        "FOLDER": module_type.source_folder,
        "JOBS": str(jobs),
        "KERNEL": of.kernel.build.release,
        "MODULES": " ".join(MODULES),
    }
    script = recipes.HERE / "compile.sh"
    with engines.container(engine, image, ["/bin/sh", "/compile.sh"], environment=environment) as made:
        engines.put_tree(made, sources, f"/src/{module_type.source_folder}")
        engines.put_file(made, "/compile.sh", script.read_bytes())
        if known := cache.find("conftest", conftest):
            engines.put_tree(made, known, "/src/conftest")
        total = sum(1 for _ in sources.rglob("*.c"))
        with report.units(f"compile {module_type}", total) as advance:
            status = engines.run(made, log, lambda line: advance(1) if _UNIT.match(line) else None)
        if status != 0:
            raise BuildError(
                f"compile {plan.cell} {module_type}",
                f"the build ended with status {status}",
                got=first_error(log.read_text(errors="replace")),
                hint=f"the log: {log}",
                repeat=repeat,
            )
        engines.get_tree(made, "/out/modules", folder)
        if not known:
            cache.make("conftest", conftest, lambda target: engines.get_tree(made, "/out/conftest", target))
    missing = [name for name in MODULES if not (folder / f"{name}.ko").is_file()]
    if missing:
        raise BuildError(f"compile {plan.cell} {module_type}", "modules are missing", got=", ".join(missing))
    shutil.copyfile(log, folder / LOG)
    (folder / _KEY).write_text(of.modules[module_type])


def first_error(log: str) -> str:
    """The first line of a build log that says what is wrong; the last line where none does."""
    lines = [line for line in log.splitlines() if line.strip()]
    return next((line.strip() for line in lines if _ERROR.search(line)), lines[-1].strip() if lines else "an empty log")


def _conftest_key(plan: Plan, of: ModuleSet, sources: Path) -> str:
    """Key of the vendor's compile tests: some 300 tiny compiles whose results both types share.

    They depend on the test script, the kernel's headers and the compiler.
    """
    return key_of(
        script=hashlib.sha256((sources / "conftest.sh").read_bytes()).hexdigest(),
        package=plan.package.sha256,
        kernel=of.kernel.build.digest,
        compiler=of.kernel.compiler,
        recipe=recipes.CONFTEST,
    )


def adopt(key: str, folder: Path, cache: Cache) -> bool:
    """Whether the modules of a key are in the cache; taken into it from ``folder`` if that has them, whole.

    So the driver stage and the image stage may run on different machines, with ``out/`` carried between them.
    """
    if cache.find_whole("modules", key):
        return True
    if not (folder / _KEY).is_file() or (folder / _KEY).read_text() != key or not is_whole(folder):
        return False
    cache.make("modules", key, lambda target: _copy(folder, target), proven=True)
    return True


def export(made: Path, target: Path) -> None:
    """Copy the modules and the log of a type to a cell's output folder, whole or not at all."""
    publish(target, lambda folder: _copy(made, folder))


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder. Not by copytree: of a full disk it makes an error that does not say so."""
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        shutil.copy2(path, target)
