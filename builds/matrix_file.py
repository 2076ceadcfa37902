"""How a matrix file is read: as YAML of which every scalar is text, with all of its problems told in one go.

Each problem has its line and its path. What a schema can say is in ``schema/matrix.json``; the rest is here.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from jsonschema.protocols import Validator
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from yaml.composer import Composer

from .errors import ConfigurationError
from .model import Arch, Cell, Flavor

SCHEMA = Path(__file__).parent / "schema" / "matrix.json"

_Path = tuple[str | int, ...]
"""Keys and positions that lead to a place in the file."""
_Problem = tuple[_Path, str]
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_FREE_KEYS: tuple[_Path, ...] = (("gvisor",),)
"""Mappings whose keys are values, so they must be text as these must."""
_VERSION = re.compile(r"\d+(\.\d+){2,}|\d+(\.\d+)+-\d[\w.+~]*")
"""A version that YAML reads as text. It is quoted all the same, as every version is."""
_TYPES = {"object": "mapping", "array": "list", "string": "text"}

_FORMATS = jsonschema.FormatChecker(formats=())


@_FORMATS.checks("version-range", raises=InvalidSpecifier)
def _is_range(value: object) -> bool:
    return not isinstance(value, str) or len(SpecifierSet(value)) > 0


def read(path: Path) -> dict[str, Any]:
    """The document in a matrix file. Raises ConfigurationError with all of its problems."""
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
    return dict(document)


_LIBYAML: Any = getattr(yaml, "CSafeLoader", None)


def _begin(loader: Any, stream: str) -> None:
    _LIBYAML.__init__(loader, stream)
    Composer.__init__(loader)


_Composing: Any = type("_Composing", (Composer, _LIBYAML), {"__init__": _begin}) if _LIBYAML else yaml.SafeLoader
"""Composes in Python what libyaml parses, which is many times as quick, where there is a libyaml."""


class _Loader(_Composing):  # type: ignore[misc]
    """Gives an alias the line where it stands, and refuses one inside of what it stands for: it would have no end."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        node: yaml.Node | None = super().compose_node(parent, index)
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

    One that it does read as text, 1877.10.0 say, is no better: what stands beside it might be 1877.10.
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
    if node.tag == _TEXT:
        unquoted = not node.style and _VERSION.fullmatch(node.value)
        return _Misread(node.value, "") if unquoted else node.value
    return _Misread(node.value, _reading(node))


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
            elif path in _FREE_KEYS and isinstance(key, yaml.ScalarNode) and key.tag != _TEXT:
                yield (*path, key.value), _quoted(_Misread(key.value, _reading(key)))
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
        unknown = error.validator == "enum"
        yield (*path, found), _unknown_key(found, wanted) if unknown else _what(error, validator)
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
        others = validator.evolve(schema=schema).iter_errors(found.text)
        return "; and ".join([_quoted(found), *(_what(other, validator) for other in others)])
    got = f", got {found!r}" if isinstance(found, str) else ""
    match error.validator:
        case "enum":
            return f"is not one of {', '.join(wanted)}{got}"
        case "format" | "pattern":
            return f"is not {schema['description']}{got}"
        case "minItems" | "minLength":
            return "must not be empty"
    return error.message


def _quoted(found: _Misread) -> str:
    if not found.reading:
        return f'must be quoted, as every version: write "{found.text}"'
    return f'must be quoted, or YAML reads it as {found.reading}: write "{found.text}"'


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
    drivers = {version for _, driver in _entries(document.get("drivers")) if (version := _text(driver.get("version")))}
    for path, version in _named_drivers(document):
        if version not in drivers:
            yield path, f"is not one of the drivers: {version}"
        elif path[0] == "gvisor" and str(path[1]).isdecimal() and version.partition(".")[0] != path[1]:
            yield path, f"is not of this branch: {version}"
    known = {cell.id for cell in cells(document)}
    named: list[tuple[_Path, str]] = [(("default",), default)] if isinstance(default, str) else []
    named += [(("representative", place), text) for place, text in _texts(document.get("representative"))]
    yield from ((path, f"is not a cell of this file: {text}") for path, text in named if known and text not in known)


def _named_drivers(document: Mapping[str, Any]) -> Iterator[tuple[_Path, str]]:
    """Where the document speaks of a driver version in text, other than in the list of drivers."""
    gvisor = document.get("gvisor")
    named: list[tuple[_Path, object]] = []
    if isinstance(gvisor, dict):
        named += [(("gvisor", branch), version) for branch, version in gvisor.items()]
    for number, release in _entries(document.get("releases")):
        named += [
            (("releases", number, "drivers", place), version) for place, version in _items(release.get("drivers"))
        ]
    yield from ((path, version) for path, version in named if isinstance(version, str) and version)


def _once(document: Mapping[str, Any]) -> Iterator[tuple[_Path, str, _Path]]:
    """What may be there once only: the list that it is in, what it is, where it stands."""
    for part, key in (("drivers", "version"), ("releases", "gl")):
        for number, entry in _entries(document.get(part)):
            if text := _text(entry.get(key)):
                yield (part,), text, (part, number, key)
    for number, release in _entries(document.get("releases")):
        for axis in ("arch", "flavor", "drivers"):
            for position, text in _texts(release.get(axis)):
                yield ("releases", number, axis), text, ("releases", number, axis, position)
    for number, driver in _entries(document.get("drivers")):
        for position, text in _texts(driver.get("arch")):
            yield ("drivers", number, "arch"), text, ("drivers", number, "arch", position)
    for number, rule in _entries(document.get("exclude")):
        keys = (rule.get("driver"), rule.get("kernel", "any kernel"), rule.get("module_type"))
        texts = [",".join(sorted(map(str.strip, text.split(",")))) for key in keys if (text := _text(key))]
        if len(texts) == len(keys):
            yield ("exclude",), " ".join(texts), ("exclude", number)


def cells(document: Mapping[str, Any]) -> Iterator[Cell]:
    """The cells of a document, as far as it has the shape that it should."""
    releases, drivers = (_entries(document.get(part)) for part in ("releases", "drivers"))
    for (_, release), (_, driver) in product(releases, drivers):
        version, gl = _text(driver.get("version")), _text(release.get("gl"))
        if "drivers" in release and version not in [text for _, text in _texts(release["drivers"])]:
            continue
        made_for = {arch for _, arch in _texts(driver["arch"])} if "arch" in driver else {*Arch}
        for (_, arch), (_, flavor) in product(_texts(release.get("arch")), _texts(release.get("flavor"))):
            if version and gl and arch in {*Arch} & made_for and flavor in {*Flavor}:
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
