"""The command line: the verbs of the sessions, for use without nox."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, errors, outlook
from . import settings as configuration
from .console import Reporter
from .errors import ConfigurationError, ExcludedError, HarnessError, InfrastructureError
from .model import Arch, Cell

if TYPE_CHECKING:
    from .plan import ModuleSet

_EPILOG = """\
Cells are named in full (570.172.08-1877.3-amd64-cloud) or selected by DRIVER_VERSION, GL_VERSION, TARGET_ARCH and
KERNEL_FLAVOR; with neither, the lab's default cell is taken.
Exit status: 0 done, 2 configuration, 3 build, 4 verification, 5 infrastructure, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; its exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    options = _parser().parse_args(arguments)
    report = Reporter()
    try:
        return int(options.run(options, report) or 0)
    except KeyboardInterrupt:
        report.say("interrupted", style="bold red")
        return errors.INTERRUPTED
    except BrokenPipeError:
        return errors.INTERRUPTED
    except Exception as error:  # noqa: BLE001  # no traceback reaches a user
        problem = _problem(error)
        report.fail(problem)
        return int(problem.kind)


def _problem(error: Exception) -> HarnessError:
    """What to say of an error."""
    if isinstance(error, HarnessError):
        return error
    if isinstance(error, OSError):  # whatever no step foresaw of disk, network and engine
        place = str(error.filename) if error.filename else type(error).__name__
        return InfrastructureError(place, error.strerror or str(error), hint="see its settings and permissions")
    return _fault(error)


def _fault(error: Exception) -> InfrastructureError:
    """What to say of an error that is ours: its traceback goes to a file, if there is room for one."""
    where = "no file: it could not be written"
    with suppress(OSError):
        with tempfile.NamedTemporaryFile("w", prefix="nvidia-builds-", suffix=".log", delete=False) as log:
            traceback.print_exception(error, file=log)
        where = log.name
    return InfrastructureError(
        "this program",
        "came upon something that it does not handle",
        got=f"{type(error).__name__}: {error}"[:200],
        hint=f"report it with {where}",
    )


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m builds",
        description="Build, verify and ship precompiled NVIDIA driver images for Garden Linux.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[..., int | None], text: str, *, cells: bool = True) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, epilog=_EPILOG if cells else None)
        added.set_defaults(run=run)
        for row in configuration.SETTINGS:
            flag = "--" + row.name.replace("_", "-")
            added.add_argument(flag, metavar="VALUE", help=f"{row.help} [{row.variable}]".replace("%", "%%"))
        if cells:
            added.add_argument("cells", nargs="*", metavar="CELL", help="cell ids")
            added.add_argument(
                "--among-others", action="store_true", help="the cells are some of many: excluded ones are no failure"
            )
        return added

    setup = verb("setup", _setup, "make a Debian machine ready: container engine, mmdebstrap, emulators", cells=False)
    setup.add_argument(
        "--arch",
        action="append",
        choices=[*map(str, Arch)],
        help="also to run programs of this architecture; default: those that TARGET_ARCH selects",
    )
    verb("lab", _lab, "make the inputs of lab cells from Debian's archive, anew where it has newer packages")
    verb("list", _list, "print the ids of the selected cells")
    plan = verb("plan", _plan, "print what one cell depends on, or what becomes of many, offline")
    plan.add_argument("--json", action="store_true", help="as JSON on standard output")
    plan.add_argument("--offline", action="store_true", help="of one cell, too, only what becomes of it")
    plan.add_argument(
        "--ci",
        nargs="?",
        metavar="JOBS",
        type=_jobs,
        const=outlook.JOBS,
        help="share the cells out among CI jobs, at most so many (%(const)s): a matrix as GitHub takes it",
    )
    verb("probe-headers", _probe_headers, "tell in seconds which known changes of its interface a kernel has")
    verb("build-driver", _build_driver, "compile the kernel modules")
    verb("build-image", _build_image, "pack the image from compiled modules")
    verb("build", _build, "compile and pack")
    verb("lab-matrix", _lab_matrix, "build and verify cells in one go, and prove the rules that leave something out")
    verify = verb("verify", _verify, "prove the image right; builds first what is missing")
    verify.add_argument("--image", metavar="REF", help="an image that is there already: oci:<folder>, or in a registry")
    verify.add_argument("--cell", metavar="CELL", help="the cell of --image, where its tag does not say it")
    verify.add_argument("--record", metavar="FILE", help="repeat what a record tells of, and show what differs")
    push = verb("push", _push, "put verified images into the repository that IMAGE_PATH names, byte for byte")
    push.add_argument(
        "--drop-builds", action="store_true", help="let tags lose kernel builds that their images have modules for"
    )
    probe = verb(
        "probe-package", _probe_package, "read a driver package and say whether every field is understood", cells=False
    )
    probe.add_argument("package", metavar="VERSION|FILE", help="a file, or a version from where NVIDIA_BASE_URL leads")
    probe.add_argument("--arch", choices=[*Arch], type=Arch, help="architecture that it has to be of")
    how = probe.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="everything, as JSON on standard output")
    how.add_argument(
        "--differences", action="store_true", help="the user space against the classic flow's, as Markdown"
    )
    values = verb(
        "helm", _helm, "bring the Helm values in line with the matrix, or write them for IMAGE_PATH", cells=False
    )
    values.add_argument("--output", metavar="DIR", type=Path, help="write values for the repository of IMAGE_PATH here")
    values.add_argument("--check", action="store_true", help="write nothing; say whether they are current")
    verb("summary", _summary, "print digest, size, times and checks of the selected cells")
    clean = verb("clean", _clean, "empty the output folder", cells=False)
    clean.add_argument("--all", action="store_true", help="empty the cache as well")
    return parser


def _settings(options: argparse.Namespace) -> dict[str, str]:
    given = vars(options)
    return {row.name: given[row.name] for row in configuration.SETTINGS if given[row.name]}


def _cells(options: argparse.Namespace) -> tuple[Cell, ...]:
    from . import matrix

    if options.cells:
        return tuple(map(matrix.find, options.cells))
    return matrix.select(os.environ)


def _each(options: argparse.Namespace, report: Reporter, step: Callable[..., object]) -> int:
    """Do a step for each selected cell; go on after a failed one, and end with the first failure's status.

    A cell that rules exclude is a failure only where it is asked for alone.
    """
    from . import pipeline

    status, cells = 0, _cells(options)
    for number, cell in enumerate(cells, 1):
        if len(cells) > 1:
            report.say(f"[{number} of {len(cells)}] {cell}", style="bold")
        try:
            step(pipeline.start(cell, _settings(options), report))
        except BrokenPipeError:
            raise
        except ExcludedError as error:
            if len(cells) > 1 or options.among_others:
                report.say(f"  {error.fact}: {error.got}", style="yellow")
            else:
                report.fail(error)
                status = int(error.kind)
        except Exception as error:  # noqa: BLE001  # the other cells have nothing to do with it
            problem = _problem(error)
            report.fail(problem)
            status = status or int(problem.kind)
    return status


def _setup(options: argparse.Namespace, report: Reporter) -> None:
    from . import hostsetup, matrix

    arches = map(Arch, options.arch) if options.arch else {cell.arch for cell in matrix.select(os.environ)}
    hostsetup.prepare(report, arches)


def _lab(options: argparse.Namespace, report: Reporter) -> None:
    from . import pipeline

    pipeline.make_inputs([pipeline.start(cell, _settings(options), report) for cell in _cells(options)], refresh=True)


def _list(options: argparse.Namespace, _report: Reporter) -> None:
    for cell in _cells(options):
        print(cell)


def _jobs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= outlook.JOBS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {outlook.JOBS}, got {text!r}")
    return int(text)


def _plan(options: argparse.Namespace, report: Reporter) -> int:
    cells = _cells(options)
    if len(cells) > 1 or options.offline or options.ci:
        return _plan_offline(options, cells, report)
    return _plan_in_depth(options, report)


def _plan_offline(options: argparse.Namespace, cells: Sequence[Cell], report: Reporter) -> int:
    from . import matrix, outputs

    out = configuration.resolve(options=_settings(options)).out_dir
    found = outlook.make(matrix.load_all(), cells, outputs.made(out, cells))
    if options.ci:
        outlook.refuse(found.collisions)
        print(json.dumps(outlook.ci_matrix(outlook.groups(found, options.ci))))
    elif options.json:
        print(json.dumps(found.to_json(), indent=1, sort_keys=True))
    else:
        outlook.show(found, report)
    outlook.refuse(found.collisions)
    return 0


def _plan_in_depth(options: argparse.Namespace, report: Reporter) -> int:
    from . import pipeline

    plans = []
    status = _each(options, report, lambda run: plans.append(pipeline.plan(run)[0]))
    if options.json:
        print(json.dumps([plan.to_json() for plan in plans], indent=1, sort_keys=True))
    else:
        for plan in plans:
            rows = [
                *(row for one in plan.sets for row in _shown(one)),
                ("base", f"{plan.base.reference} {plan.base.digest[:19]}"),
                ("driver package", f"{plan.package.name} {plan.package.sha256[:12]} ({plan.package.checksum})"),
                *((name, f"{one.version} {one.sha256[:12]}") for name, one in plan.components.items()),
                *((name, f"absent by rule: {reason}") for name, reason in plan.components_absent.items()),
                ("user space", plan.userspace[:12]),
                ("image", plan.image[:12]),
                *((f"tag ({tag.kind})", tag.name) for tag in plan.tags),
                ("addressable", "yes" if plan.addressable else "no: the kernel's name is not legal in a tag"),
            ]
            report.table(plan.cell.id, ("part", "what"), rows)
    return status


def _shown(one: ModuleSet) -> list[tuple[str, str]]:
    """What a plan says of a module set."""
    build = one.kernel.build
    return [
        ("kernel", f"{build.release} ({build.package}), of {', '.join(one.releases)}"),
        ("kmodbuild", f"{one.kmodbuild.reference} {one.kmodbuild.digest[:19]}"),
        *((f"{name} modules", key[:12]) for name, key in one.modules.items()),
        *((f"{name} modules", f"absent by rule: {reason}") for name, reason in one.absent.items()),
    ]


def _probe_headers(options: argparse.Namespace, report: Reporter) -> int:
    from . import pipeline

    return _each(options, report, pipeline.probe)


def _build_driver(options: argparse.Namespace, report: Reporter) -> int:
    from . import pipeline

    return _each(options, report, pipeline.build_driver)


def _build_image(options: argparse.Namespace, report: Reporter) -> int:
    from . import pipeline

    return _each(options, report, pipeline.build_image)


def _build(options: argparse.Namespace, report: Reporter) -> int:
    from . import pipeline

    return _each(options, report, pipeline.build)


def _lab_matrix(options: argparse.Namespace, report: Reporter) -> None:
    from . import lab_matrix, matrix, pipeline

    cells = tuple(map(matrix.find, options.cells)) or matrix.representative()
    lab_matrix.walk([pipeline.start(cell, _settings(options), report) for cell in cells], report)


def _verify(options: argparse.Namespace, report: Reporter) -> int:
    from . import matrix, pipeline, recheck

    if options.record is not None:
        if options.cell or options.cells:
            raise ConfigurationError("--record", "names its cell itself", got=options.cell or options.cells[0])
        if not Path(options.record).is_file():
            raise ConfigurationError("--record", "must name the record.json of a verification", got=options.record)
        recheck.repeat(Path(options.record), options.image, _settings(options), report)
        return 0
    if options.image is None:
        if options.cell:
            raise ConfigurationError("--cell", "is the cell of --image, which is not given", got=options.cell)
        return _each(options, report, pipeline.verify_cell)
    if not options.image:
        raise ConfigurationError("--image", "must name an image", got="nothing", hint="is a variable empty?")
    named = {matrix.find(text) for text in (*options.cells, *([options.cell] if options.cell else []))}
    if len(named) > 1:
        raise ConfigurationError("--image", "is of one cell", got=", ".join(sorted(map(str, named))))
    recheck.verify_image(options.image, named.pop() if named else None, _settings(options), report)
    return 0


def _push(options: argparse.Namespace, report: Reporter) -> int:
    from . import pipeline

    return _each(options, report, lambda run: pipeline.push(run, drop_builds=options.drop_builds))


def _probe_package(options: argparse.Namespace, report: Reporter) -> None:
    from . import pipeline, probe_package
    from .cache import Cache

    settings = configuration.resolve(options=_settings(options))
    pipeline.claim(settings.cache_dir)
    probe_package.run(
        options.package,
        options.arch,
        settings.nvidia_base_url,
        Cache(settings.cache_dir),
        report,
        as_json=options.json,
        differences=options.differences,
    )


def _helm(options: argparse.Namespace, report: Reporter) -> None:
    from . import helm, matrix

    settings = configuration.resolve(options=_settings(options))
    helm.run(matrix.load_all(), settings.image_path, options.output, report, check=options.check)


def _summary(options: argparse.Namespace, report: Reporter) -> None:
    from . import outputs

    out = configuration.resolve(options=_settings(options)).out_dir
    outputs.summary({cell: out / cell.id for cell in _cells(options)}, report)


def _clean(options: argparse.Namespace, report: Reporter) -> None:
    from . import pipeline

    pipeline.clean(configuration.resolve(options=_settings(options)), everything=options.all, report=report)


if __name__ == "__main__":
    sys.exit(main())
