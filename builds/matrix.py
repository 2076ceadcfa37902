"""The matrix files: which cells there are, what is excluded and why, and which of the cells are selected.

Reading needs neither engine nor network, and is quick: ``nox -l`` does it on every call.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from jsonschema.protocols import Validator
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from .errors import ConfigurationError
from .model import Arch, Cell, Flavor, ModuleType
from .settings import SELECTION

HERE = Path(__file__).parent
SCHEMA = HERE / "schema" / "matrix.json"
FILES = (HERE / "lab.yaml", HERE / "matrix.yaml")


@dataclass(frozen=True)
class Rule:
    """Says that a module type of some drivers cannot be built for some kernels, and why."""

    driver: str
    """Range of driver versions, as PEP 440 writes ranges."""
    kernel: str
    """Range of upstream kernel versions; empty: any."""
    module_type: ModuleType
    reason: str

    def applies(self, driver: str, kernel: str) -> bool:
        """Whether the rule is about this driver version and this upstream kernel version."""
        return SpecifierSet(self.driver).contains(driver) and SpecifierSet(self.kernel).contains(
            kernel, prereleases=True
        )


@dataclass(frozen=True)
class Matrix:
    """One matrix file, checked."""

    path: Path
    inputs: str
    settings: Mapping[str, str]
    os_tag: str
    alias: str
    base: Mapping[Arch, str]
    pins: Mapping[tuple[str, Arch], str]
    """Pinned sha256 of driver packages."""
    cells: tuple[Cell, ...]
    rules: tuple[Rule, ...]
    default: Cell | None

    def owns_branch(self, cell: Cell) -> bool:
        """Whether a cell's driver is the newest of its branch for the same node: it alone moves the branch's tag."""
        rivals = [
            other.driver
            for other in self.cells
            if (other.gl, other.arch, other.flavor, other.driver_major)
            == (cell.gl, cell.arch, cell.flavor, cell.driver_major)
        ]
        return max((cell.driver, *rivals), key=Version) == cell.driver


@functools.cache
def load(path: Path) -> Matrix:
    """Read a matrix file. Raises ConfigurationError with all of its problems, each with line and path."""
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=_Loader)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ConfigurationError(path.name, "cannot be read as YAML", got=" ".join(str(error).split())) from error
    if root is None:
        raise ConfigurationError(path.name, "is empty")
    nodes = list(_walk(root, (), _line(root)))
    lines = {place: line for place, line, _ in nodes}
    document = _document(root)
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()), format_checker=_FORMATS)
    problems = {
        *(slip for place, _, node in nodes for slip in _slips(place, node)),
        *(problem for error in validator.iter_errors(document) for problem in _problems(error, validator)),
        *_meaning(document, lines),
    }
    if problems:
        said = sorted((lines[place], _place(place), what) for place, what in problems)
        raise ConfigurationError(
            path.name,
            f"has {len(said)} problem{'s' if len(said) > 1 else ''}"
            + "".join(f"\n  line {line}: {place}: {what}" for line, place, what in said),
            hint=f"the rules are in builds/schema/{SCHEMA.name}",
        )
    return Matrix(
        path=path,
        inputs=document["inputs"],
        settings=document.get("settings", {}),
        os_tag=document["os_tag"],
        alias=document["alias"],
        base={Arch(arch): gl for arch, gl in document["base"].items()},
        pins={
            (driver["version"], Arch(arch)): sha256
            for driver in document["drivers"]
            for arch, sha256 in driver.get("sha256", {}).items()
        },
        cells=tuple(_cells(document)),
        rules=tuple(
            Rule(rule["driver"], rule.get("kernel", ""), ModuleType(rule["module_type"]), rule["reason"])
            for rule in document.get("exclude", [])
        ),
        default=Cell.parse(document["default"]) if "default" in document else None,
    )


def load_all() -> tuple[Matrix, ...]:
    """The lab matrix and the release matrix."""
    return tuple(map(load, FILES))


def matrix_of(cell: Cell) -> Matrix:
    """The matrix that a cell is of. Raises ConfigurationError naming the nearest known cells."""
    for matrix in load_all():
        if cell in matrix.cells:
            return matrix
    raise unknown("cell", cell.id, (known.id for matrix in load_all() for known in matrix.cells))


def find(text: str) -> Cell:
    """The cell that an id means. Raises ConfigurationError naming the nearest known cells where it means none."""
    try:
        cell = Cell.parse(text)
    except ConfigurationError as error:
        raise unknown("cell", text, (known.id for matrix in load_all() for known in matrix.cells)) from error
    matrix_of(cell)
    return cell


def select(environ: Mapping[str, str]) -> tuple[Cell, ...]:
    """The cells that the environment selects; the default cell where it selects nothing.

    An axis that is not set is open for drivers and releases, and has its default for architecture and flavour;
    ``GL_VERSION=all`` opens every axis that is not set. Raises ConfigurationError for a value that no cell has,
    naming the nearest, and for a selection that holds no cell.
    """
    given = {row.name: environ[row.variable] for row in SELECTION if environ.get(row.variable)}
    matrices = load_all()
    if not given:
        return tuple(matrix.default for matrix in matrices if matrix.default)
    cells = [cell for matrix in matrices for cell in matrix.cells]
    axes = {"driver_version": "driver", "gl_version": "gl", "target_arch": "arch", "kernel_flavor": "flavor"}
    for row in SELECTION:
        wanted = given.get(row.name) or ("all" if given.get("gl_version") == "all" else row.default)
        if wanted in ("", "all"):
            continue
        values = {"baremetal" if value.strip() == "metal" else value.strip() for value in wanted.split(",")}
        known = {str(getattr(cell, axes[row.name])) for matrix in matrices for cell in matrix.cells}
        for value in sorted(values - known):
            raise unknown(row.variable, value, known)
        cells = [cell for cell in cells if str(getattr(cell, axes[row.name])) in values]
    if not cells:
        said = " ".join(f"{row.variable}={given[row.name]}" for row in SELECTION if row.name in given)
        raise ConfigurationError(
            "selection", "holds no cell", got=said, hint="`GL_VERSION=all nox -l` lists every cell"
        )
    return tuple(sorted(cells))


def unknown(subject: str, value: str, known: Iterable[str]) -> ConfigurationError:
    """The error for a name that is not among the known ones: it names the nearest."""
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.3) or names[:3]
    return ConfigurationError(f"{subject} {value}", "is not in any matrix", hint=f"nearest: {', '.join(near)}")


_Path = tuple[str | int, ...]
"""Keys and positions that lead to a place in the file."""
_Problem = tuple[_Path, str]
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_TYPES = {"object": "mapping", "array": "list", "string": "text"}

_FORMATS = jsonschema.FormatChecker(formats=())


@_FORMATS.checks("version-range", raises=InvalidSpecifier)
def _is_range(value: object) -> bool:
    return not isinstance(value, str) or len(SpecifierSet(value)) > 0


class _Loader(yaml.SafeLoader):
    """Gives an alias the line where it stands, and refuses one inside of what it stands for: it would have no end."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if node is None or not alias:
            return node
        if node.end_mark is None:
            raise yaml.MarkedYAMLError(problem="found an alias inside of what it stands for", problem_mark=mark)
        node = copy.copy(node)
        node.start_mark = mark
        return node


@dataclass(frozen=True)
class _Misread:
    """A scalar that YAML does not read as text, such as an unquoted version: as it is written, and as it is read.

    Every scalar of a matrix file is text. Being no ``str``, this one is refused wherever a text must stand.
    """

    text: str
    reading: str


def _reading(node: yaml.ScalarNode) -> str:
    """What YAML makes of a scalar that is no text to it."""
    kind = node.tag.rpartition(":")[2]
    if kind not in ("bool", "float", "int"):
        return {"timestamp": "a date"}.get(kind, kind)
    try:
        return str(yaml.constructor.SafeConstructor().construct_object(node))
    except (LookupError, OverflowError, ValueError):  # a tag can be on any text
        return kind


def _document(node: yaml.Node) -> Any:
    """What is in a node, with every scalar as it is written."""
    if isinstance(node, yaml.MappingNode):
        return {key: _document(value) for key, (_, value) in _pairs(node).items()}
    if isinstance(node, yaml.SequenceNode):
        return [_document(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return node.value if node.tag == _TEXT else _Misread(node.value, _reading(node))


def _merged(key: yaml.Node, value: yaml.Node) -> list[yaml.MappingNode]:
    """The mappings that an entry of a mapping merges into it, if it is a ``<<`` that can."""
    sources: list[Any] = value.value if isinstance(value, yaml.SequenceNode) else [value]
    return sources if key.tag == _MERGE and all(isinstance(source, yaml.MappingNode) for source in sources) else []


def _pairs(node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a mapping: what it merges in, the first named first, and over that its own, the last first."""
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for source in reversed([source for key, value in node.value for source in _merged(key, value)]):
        merged |= _pairs(source)
    return merged | {key.value: (key, value) for key, value in _own(node)}


def _own(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values that a mapping has written down itself."""
    return [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode) and not _merged(key, value)]


def _walk(node: yaml.Node, path: _Path, line: int) -> Iterator[tuple[_Path, int, yaml.Node]]:
    """Everything there is, with path and line: an entry of a mapping stands where its key does."""
    yield path, line, node
    if isinstance(node, yaml.MappingNode):
        for name, (key, value) in _pairs(node).items():
            yield from _walk(value, (*path, name), _line(key))
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _walk(item, (*path, number), _line(item))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _place(path: _Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "file"


def _slips(path: _Path, node: yaml.Node) -> Iterator[_Problem]:
    """What only the YAML shows: keys that are given twice (the last would count) or are no text, stray tags."""
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        yield path, f"has a tag, which means nothing here: {node.tag}"
    if isinstance(node, yaml.MappingNode):
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            yield path, "has a key that is no text"
        first: dict[str, int] = {}
        for key, _ in _own(node):
            if key.value in first:
                yield (*path, key.value), f"is given twice, first on line {first[key.value]}"
            first.setdefault(key.value, _line(key))


def _problems(error: jsonschema.ValidationError, validator: Validator) -> Iterator[_Problem]:
    """What the schema has to say, in the words of the file: each key on its own."""
    path = tuple(error.absolute_path)
    found: Any = error.instance
    wanted: Any = error.validator_value
    schema: Any = error.schema
    if error.validator == "required":
        yield from ((path, f"has no {key}") for key in wanted if key not in found)
    elif error.validator == "additionalProperties":
        known = list(schema["properties"])
        yield from (((*path, key), _unknown_key(key, known)) for key in found if key not in known)
    elif "propertyNames" in error.absolute_schema_path:
        yield (*path, found), _unknown_key(found, wanted)
    elif error.validator != "uniqueItems":  # _meaning says which
        yield path, _what(error, validator)


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"is not a known key; known: {', '.join(known)}" + "".join(f"; did you mean {name}?" for name in near)


def _what(error: jsonschema.ValidationError, validator: Validator) -> str:
    found: Any = error.instance
    wanted: Any = error.validator_value
    schema: Any = error.schema
    if error.validator == "type" and (wanted != "string" or not isinstance(found, _Misread)):
        return f"must be a {_TYPES[wanted]}"
    if isinstance(found, _Misread):
        if not found.text:
            return "has no value"
        quoted = f'must be quoted, or YAML reads it as {found.reading}: write "{found.text}"'
        others = validator.evolve(schema=schema).iter_errors(found.text)
        return "; and ".join([quoted, *(_what(other, validator) for other in others)])
    got = f", got {found!r}" if isinstance(found, str) else ""
    match error.validator:
        case "enum":
            return f"is not one of {', '.join(wanted)}{got}"
        case "format" | "pattern":
            return f"is not {schema['description']}{got}"
        case "minItems" | "minLength":
            return "must not be empty"
    return error.message


def _meaning(document: Any, lines: Mapping[_Path, int]) -> Iterator[_Problem]:
    """What a schema cannot say, as far as the document has the shape that it should."""
    if not isinstance(document, dict):
        return
    first: dict[tuple[_Path, str], _Path] = {}
    for among, text, path in _once(document):
        earlier = first.setdefault((among, text), path)
        if earlier != path:
            where = f"first on line {lines[earlier]} as {_place(earlier)}"
            yield path, f"is given twice: {text}, {where}: duplicate {'rules' if among == ('exclude',) else 'cells'}"
    base, default = document.get("base"), document.get("default")
    for number, release in _entries(document.get("releases")):
        for _, arch in _texts(release.get("arch")):
            if isinstance(base, dict) and arch in {*Arch} and arch not in base:
                yield ("releases", number, "arch"), f"has {arch}, for which base names no release"
    cells = [cell.id for cell in _cells(document)]
    if cells and isinstance(default, str) and default not in cells:
        yield ("default",), f"is not a cell of this file: {default}"


def _once(document: Mapping[str, Any]) -> Iterator[tuple[_Path, str, _Path]]:
    """What may be there once only: the list that it is in, what it is, where it stands."""
    for part, key in (("drivers", "version"), ("releases", "gl")):
        for number, entry in _entries(document.get(part)):
            if text := _text(entry.get(key)):
                yield (part,), text, (part, number, key)
    for number, release in _entries(document.get("releases")):
        for axis in ("arch", "flavor"):
            for position, text in _texts(release.get(axis)):
                yield ("releases", number, axis), text, ("releases", number, axis, position)
    for number, rule in _entries(document.get("exclude")):
        keys = (rule.get("driver"), rule.get("kernel", "any kernel"), rule.get("module_type"))
        texts = [",".join(sorted(map(str.strip, text.split(",")))) for key in keys if (text := _text(key))]
        if len(texts) == len(keys):
            yield ("exclude",), " ".join(texts), ("exclude", number)


def _cells(document: Mapping[str, Any]) -> Iterator[Cell]:
    """The cells of a document, as far as it has the shape that it should."""
    releases, drivers = (_entries(document.get(part)) for part in ("releases", "drivers"))
    for (_, release), (_, driver) in product(releases, drivers):
        version, gl = _text(driver.get("version")), _text(release.get("gl"))
        for (_, arch), (_, flavor) in product(_texts(release.get("arch")), _texts(release.get("flavor"))):
            if version and gl and arch in {*Arch} and flavor in {*Flavor}:
                yield Cell(version, gl, Arch(arch), Flavor(flavor))


def _entries(items: object) -> list[tuple[int, dict[str, Any]]]:
    """The mappings of a list, if it is one, with their positions."""
    return [(number, item) for number, item in _items(items) if isinstance(item, dict)]


def _texts(items: object) -> list[tuple[int, str]]:
    """The texts of a list, if it is one, with their positions."""
    return [(number, text) for number, item in _items(items) if (text := _text(item))]


def _items(items: object) -> Iterable[tuple[int, object]]:
    return enumerate(items) if isinstance(items, list) else ()


def _text(value: object) -> str | None:
    """A scalar as it is written; nothing for what is none, or is empty."""
    text = value.text if isinstance(value, _Misread) else value
    return text if isinstance(text, str) and text else None
