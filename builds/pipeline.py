"""The flow of one cell, step after step: inputs, plan, modules, image, verification.

Each step is a function of another module; here is only their order, what is kept of them in ``out/<cell>/``, and
what makes a repeated run short.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from . import compile as compiling
from . import engine as engines
from . import http, lab, matrix, oci, outlook, outputs, registry, userspace, verify
from . import image as packing
from . import plan as planning
from . import probe as probing
from . import push as pushing
from .cache import Cache, disk_errors, locked, remove, write_atomically
from .console import Reporter
from .errors import BuildError, ConfigurationError, HarnessError, InfrastructureError, VerificationError
from .image import Compiled
from .matrix import Matrix
from .model import Arch, Cell, ModuleType
from .oci import Image
from .plan import Inputs, ModuleSet, Plan
from .push import Pushed
from .record import RECORD, Record
from .settings import DEFAULTS, Settings, resolve
from .tags import TagKind

_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# made by gardenlinux-nvidia-builds, which may empty this folder\n"
"""Content of CACHEDIR.TAG: its first line is what backup tools know, its second is ours."""


@dataclass(frozen=True)
class Run:
    """A cell with everything that a step needs to know of its surroundings."""

    cell: Cell
    matrix: Matrix
    settings: Settings
    cache: Cache
    report: Reporter

    @property
    def out(self) -> Path:
        """The cell's output folder."""
        return self.settings.out_dir / self.cell.id

    @property
    def layout(self) -> Path:
        """The OCI layout of the cell's image."""
        return self.out / outputs.IMAGE

    def modules(self, of: ModuleSet, module_type: ModuleType) -> Path:
        """Where the driver stage leaves the modules of a type, and the image stage looks for them."""
        return self.out / outputs.MODULES / of.id / module_type

    @property
    def logs(self) -> Path:
        """Logs of the cell's steps."""
        return self.out / outputs.LOGS


def start(cell: Cell, options: Mapping[str, str], report: Reporter, defaults: Mapping[str, str] | None = None) -> Run:
    """Work out the surroundings of a cell; ``defaults`` go before what its matrix file sets, by variable.

    Raises ConfigurationError for a cell that no matrix has.
    """
    of = matrix.matrix_of(cell)
    settings = resolve({**of.settings, **(defaults or {})}, options)
    for folder in (settings.cache_dir, settings.out_dir):
        claim(folder)
    return Run(cell, of, settings, Cache(settings.cache_dir), report)


def claim(folder: Path) -> None:
    """Make a folder of ours if it is not there, and mark it as ours if it is empty: no other is ever emptied."""
    with disk_errors(folder.name, folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            write_atomically(folder / "CACHEDIR.TAG", _TAG)


def make_inputs(runs: Iterable[Run], *, refresh: bool) -> None:
    """Make the inputs of lab cells where they are missing, or all of them anew if the archive has newer ones.

    Raises ConfigurationError where others than the lab's are to be made anew.
    """
    for run in runs:
        if not _is_lab(run):
            if refresh:
                raise ConfigurationError(
                    f"cell {run.cell}",
                    "its inputs are not the lab's to make",
                    got=http.public(f"{run.settings.gl_registry} and {run.settings.nvidia_base_url}"),
                    hint="the lab makes those of the cells in builds/lab.yaml",
                )
        elif refresh or _missing(run):
            lab.make(run.matrix.siblings(run.cell), _bases(run), run.cache, run.report)


def plan(run: Run) -> tuple[Plan, Inputs]:
    """Resolve and plan a cell. Raises ConfigurationError where a lab cell's inputs are not made yet."""
    if _is_lab(run) and (missing := _missing(run)):
        raise ConfigurationError(
            f"cell {run.cell}",
            "its inputs are not made yet, so nothing is known of them",
            got=f"no {', no '.join(missing)}",
            hint=f'nox -s "lab({run.cell})" makes them; so does a build',
        )
    return planning.resolve(run.cell, run.matrix, run.settings, run.cache, run.report)


def probe(run: Run) -> None:
    """Tell which known changes of the kernel's interface the cell's kernel has, and which drivers they break."""
    with phase(run, "probe-headers"):
        make_inputs([run], refresh=False)
        made, inputs = plan(replace(run, matrix=replace(run.matrix, rules=())))  # excluded ones have headers, too
        engine = engines.connect()
        for one in made.sets:
            found = probing.run(made, one, inputs, engine=engine, cache=run.cache, report=run.report)
            probing.show(one, found, run.matrix, run.report)


def build_driver(run: Run) -> Plan:
    """Compile the modules of both types, where rules allow; leaves them in ``out/<cell>/modules/``."""
    with phase(run, "build-driver"):
        made, inputs = _planned(run)
        _driver(run, made, inputs)
    return made


def build_image(run: Run) -> Image:
    """Pack the image from modules that are compiled already; leaves it in ``out/<cell>/image/``.

    Raises ConfigurationError where the plan's modules are nowhere to be found.
    """
    with phase(run, "build-image"):
        made, inputs = _planned(run)
        for one, module_type, key in _each_type(made):
            if not compiling.adopt(key, run.modules(one, module_type), run.cache):
                raise ConfigurationError(
                    f"cell {run.cell}",
                    f"the {module_type} modules of its plan are not compiled",
                    got=f"none for {one.kernel.build.release} ({one.kernel.build.package})",
                    hint=f'nox -s "build-driver({run.cell})" compiles them',
                )
        image = packing.find(made, run.layout, run.report) or _pack(run, made, inputs)
        _load(run, image, made)
        return image


def build(run: Run) -> Image:
    """Compile and pack."""
    with phase(run, "build"):
        made, _, image = _build(run)
        _load(run, image, made)
        return image


def verify_cell(run: Run) -> Record:
    """Prove the cell's image right; builds first what the plan lacks. Raises VerificationError where it is not."""
    with phase(run, "verify"):
        return verify_built(run, run.out, repeat_line(run.cell))


def push(run: Run, *, drop_builds: bool = False) -> Pushed:
    """Put the cell's image into the repository that IMAGE_PATH names, if its record lets it; leaves ``push.json``.

    Needs ``out/<cell>/image`` and ``record.json`` and nothing else, so it can be done elsewhere than the build.
    Raises VerificationError where the image is not verified, the repository has another under its immutable tag, or a
    tag would lose a kernel build (unless ``drop_builds``), ConfigurationError where a lab cell would go among Garden
    Linux's.
    """
    with phase(run, "push"):
        verify_it = repeat_line(run.cell)
        if run.matrix.inputs == "lab" and run.settings.image_path == DEFAULTS["image_path"]:
            raise ConfigurationError(
                f"cell {run.cell}",
                "is the lab's, which is not pushed into the repository of Garden Linux's images",
                got=run.settings.image_path,
                hint="IMAGE_PATH=<registry>/<repository> names another",
            )
        for what, path in (("has no image", run.layout / "oci-layout"), ("was not verified", run.out / RECORD)):
            if not path.is_file():
                raise VerificationError(
                    f"cell {run.cell}", f"is not pushed: it {what}", got=f"no {path}", hint=f"make it: {verify_it}"
                )
        try:
            image = oci.find_image(run.layout)
        except (BuildError, ConfigurationError) as error:
            raise VerificationError(
                f"cell {run.cell}", f"is not pushed: {error.subject} {error.fact}", got=error.got, hint=verify_it
            ) from error
        made = pushing.admit(Record.read(run.out / RECORD), image, verify_it, must_load=run.settings.must_load)
        if made.cell != run.cell:
            raise VerificationError(
                f"cell {run.cell}", "is not pushed: its record is another cell's", got=str(made.cell), hint=verify_it
            )
        place = registry.Reference.parse(f"{run.settings.image_path}@{image.digest}")
        repository = registry.connect(place.registry, place.repository, run.report)
        pushed = pushing.run(image, made.tags, repository, drop_builds=drop_builds)
        write_atomically(run.out / outputs.PUSHED, json.dumps(pushed.to_json(), indent=1) + "\n")
        pushing.show(pushed, run.report)
    return pushed


def image_of(run: Run) -> Image:
    """The image that a build left of the cell."""
    return oci.find_image(run.layout, arch=run.cell.arch)


def clean(settings: Settings, *, everything: bool, report: Reporter) -> None:
    """Empty the output folder, and the cache if ``everything``. Refuses a folder that no run of ours made."""
    for folder in (settings.out_dir, *([settings.cache_dir] if everything else [])):
        if not folder.is_dir():
            continue
        tag = folder / "CACHEDIR.TAG"
        if any(folder.iterdir()) and not (tag.is_file() and tag.read_text() == _TAG):
            raise ConfigurationError(
                str(folder),
                "was not empty when this project first used it, so it is not emptied",
                got="no CACHEDIR.TAG of this project's in it",
                hint="remove by hand what is not needed",
            )
        with disk_errors("clean", folder):
            for item in folder.iterdir():
                remove(item)
        report.say(f"emptied {folder}")


def _is_lab(run: Run) -> bool:
    """Whether inputs of the cell are taken from the lab: settings may lead a lab cell elsewhere."""
    root = run.cache.root
    settings = run.settings
    return run.matrix.inputs == "lab" and (
        settings.gl_registry == f"oci:{lab.images_root(root)}"
        or settings.nvidia_base_url == str(lab.packages_root(root))
    )


def _bases(run: Run) -> list[tuple[str, Arch]]:
    return [(run.matrix.base[run.cell.arch], run.cell.arch)]


def _missing(run: Run) -> tuple[str, ...]:
    return lab.missing(run.matrix.siblings(run.cell), _bases(run), run.cache)


def _planned(run: Run) -> tuple[Plan, Inputs]:
    make_inputs([run], refresh=False)
    made, inputs = plan(run)
    _refuse_collision(run, made)
    outputs.write_plan(run.out, made)
    _say_unexpected(run, made)
    for one in made.sets:
        for module_type, reason in one.absent.items():
            run.report.say(f"  {module_type}: absent by rule: {reason}", style="yellow")
    for reason in dict.fromkeys(made.components_absent.values()):
        names = ", ".join(name for name, why in made.components_absent.items() if why == reason)
        run.report.say(f"  {names}: absent by rule: {reason}", style="yellow")
    if len(made.sets) > 1:
        builds = ", ".join(f"{one.kernel.build.package} ({', '.join(one.releases)})" for one in made.sets)
        run.report.say(f"  {made.kernel_release} has several builds, one module set each: {builds}")
    if not made.addressable and run.matrix.inputs != "lab":
        raise ConfigurationError(
            f"cell {run.cell}",
            "has a kernel whose name is not legal in a tag, so no node would find the image",
            got=made.kernel_release,
            hint="the GPU Operator takes the name as it is; a kernel must be called otherwise",
        )
    if not made.addressable:
        run.report.say(
            f"  {made.kernel_release} is not legal in a tag: the GPU Operator cannot address this image",
            style="yellow",
        )
    return made, inputs


def _refuse_collision(run: Run, made: Plan) -> None:
    """Refuse a plan that would take the tag of another cell's image, and the modules of a kernel build with it.

    The matrix tells, as far as it knows kernels; then plans that earlier runs left in the output folder: nobody else
    knows before the tag is set. Raises ConfigurationError that names both cells.
    """
    rivals = [cell for cell in run.matrix.cells if (cell.arch, cell.flavor) == (run.cell.arch, run.cell.flavor)]
    known = outlook.make([run.matrix], rivals).collisions
    outlook.refuse([one for one in known if run.cell in one.cells])
    ours = {one.id for one in made.sets}
    tag = next(tag for tag in made.tags if tag.kind is TagKind.VERSION)
    for folder in sorted(run.settings.out_dir.glob(f"{made.cell.driver}-*-{made.cell.arch}-{made.cell.flavor}")):
        other = outputs.read_plan(folder)
        if other is None or other.cell == made.cell or other.image_path != made.image_path or tag not in other.tags:
            continue
        if lost := [one for one in other.sets if one.id not in ours]:
            raise ConfigurationError(
                f"cell {made.cell}",
                f"would take the tag {tag.name} from cell {other.cell}, whose kernel is another build of that name",
                got=", ".join(f"{one.kernel.build.package} there" for one in lost)
                + "".join(f", {one.kernel.build.package} here" for one in made.sets),
                hint="with `kernel:` of both releases in the matrix file they are one image; "
                f"if {folder} is of no use any more, remove it",
            )


def _say_unexpected(run: Run, made: Plan) -> None:
    """Say where headers are not of the kernel that the matrix expects of a release."""
    for one in made.sets:
        for gl in one.releases:
            expected = run.matrix.releases[gl].kernel
            if expected not in (None, one.kernel.build.package):
                run.report.say(
                    f"  {gl}: the matrix expects kernel {expected}, the headers are those of "
                    f"{one.kernel.build.package}: what is built follows the headers",
                    style="yellow",
                )


def _build(run: Run) -> tuple[Plan, Inputs, Image]:
    made, inputs = _planned(run)
    image = packing.find(made, run.layout, run.report)
    if image:
        run.report.say(f"  {run.cell}: up to date", style="green")
    else:
        _driver(run, made, inputs)
        image = _pack(run, made, inputs)
    return made, inputs, image


def _driver(run: Run, made: Plan, inputs: Inputs) -> None:
    """Compile the modules where no earlier run did, and leave them in the cell's output folder."""
    folders = _modules(run, made, inputs)
    for one, module_type, _ in _each_type(made):
        compiling.export(folders[one.id][module_type], run.modules(one, module_type))


def _modules(run: Run, made: Plan, inputs: Inputs) -> Compiled:
    """The plan's modules: from the cache, the cell's output folder, or the compiler."""
    engine = None
    for one in made.sets:
        lacking = [
            module_type
            for module_type, key in one.modules.items()
            if not compiling.adopt(key, run.modules(one, module_type), run.cache)
        ]
        if not lacking:
            continue
        engine = engine or engines.connect()
        found = probing.run(made, one, inputs, engine=engine, cache=run.cache, report=run.report)
        probing.check(made, one, found, run.report)
        for module_type in lacking:
            compiling.modules(
                made,
                one,
                inputs,
                module_type,
                engine=engine,
                cache=run.cache,
                jobs=run.settings.jobs,
                logs=run.logs,
                report=run.report,
            )
    return compiled(run, made)


def compiled(run: Run, made: Plan) -> Compiled:
    """The plan's modules, of those sets and types that are compiled."""
    return {
        one.id: {name: path for name, key in one.modules.items() if (path := run.cache.find("modules", key))}
        for one in made.sets
    }


def _each_type(made: Plan) -> Iterator[tuple[ModuleSet, ModuleType, str]]:
    """Every module set of a plan with each type that is built, and its key."""
    return ((one, module_type, key) for one in made.sets for module_type, key in one.modules.items())


def _pack(run: Run, made: Plan, inputs: Inputs) -> Image:
    """Write the image, from modules that are in the cache."""
    tree = compiling.driver_tree(made, inputs, run.cache, run.report)
    packed = userspace.layer(made, inputs, tree, run.cache, run.report)
    return packing.assemble(made, inputs.base, packed, compiled(run, made), run.layout, run.cache, run.report)


def verify_built(run: Run, out: Path, repeat: str) -> Record:
    """Verify the image of the cell's plan, built where it is missing, into ``out``."""
    made, inputs, image = _build(run)
    return hold(run, made, inputs, image, out, repeat, modules=_modules(run, made, inputs))


def hold(
    run: Run,
    made: Plan,
    inputs: Inputs,
    image: Image,
    out: Path,
    repeat: str,
    *,
    modules: Compiled,
    names: Sequence[str] | None = None,
    reference: str | None = None,
) -> Record:
    """Hold an image against a plan, with the engine that answers, if one does."""
    return verify.run(
        made,
        inputs,
        image,
        engine=_engine_if_any(run),
        cache=run.cache,
        out=out,
        report=run.report,
        repeat=repeat,
        modules=modules,
        names=names,
        reference=reference,
        kernels=run.settings.kernel_image,
    )


def repeat_line(cell: Cell) -> str:
    """The command that builds what a cell lacks, and verifies it."""
    return f'nox -s "verify({cell})"'


def _load(run: Run, image: Image, made: Plan) -> None:
    """Load the image into the engine under its tags."""
    with run.report.step("load into engine") as step:
        engine = engines.connect()
        loaded = engines.load(engine, image, made.names, run.report)
        step.note(f"{len(made.names)} tags" + ("" if loaded else ", there already"))


def _engine_if_any(run: Run) -> engines.Engine | None:
    try:
        return engines.connect()
    except InfrastructureError as error:
        run.report.say(f"  {error}", style="yellow")
        return None


@contextmanager
def phase(run: Run, name: str, again: str | None = None) -> Iterator[None]:
    """One session's work on a cell: under the cell's lock, with its steps' times kept for the summary.

    ``again`` is the command that repeats it, if that is not just the session.
    """
    before = len(run.report.steps)
    with (
        run.report.group(f"{name} {run.cell}"),
        locked(run.out, lambda: run.report.say(f"  waiting for another run of {run.cell}")),
        disk_errors(f"cell {run.cell}", run.out),
    ):
        outputs.forget_failure(run.out)
        try:
            yield
        except Exception as error:
            if isinstance(error, HarnessError):
                error.repeat = error.repeat or again or f'nox -s "{name}({run.cell})"'
            outputs.write_failure(run.out, name, error)
            raise
        finally:
            outputs.write_steps(run.out, name, run.report.steps[before:])
