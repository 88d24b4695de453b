"""YAML into plain data that remembers where every value stood, so that an error can point at its line.

Also puts the environment into texts, and reads JSON. What the data means is ``load``'s and ``schema``'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loadbench.errors import UsageError

Loc = tuple[str | int, ...]

# ${NAME}, ${NAME:-default}; $${NAME} stands for the text ${NAME} itself.
_VARIABLE = re.compile(r"\$(\$\{)|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


# A scenario is some six deep and has some hundred values. More is a mistake, or made to exhaust who reads it: nine
# lines of aliases can stand for 10^9 values, and 400 brackets for more calls than Python allows.
_MOST_DEPTH = 64
_MOST_VALUES = 100_000


def spell(loc: Loc) -> str:
    """``("stages", 1, "rate")`` → ``stages[1].rate``."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).lstrip(".")
    return "".join(letter if letter.isprintable() else " " for letter in path)  # a quoted key may hold line ends


@dataclass(slots=True)
class Document:
    """A file's data, the place of each value (``scenarios/edge.yaml:14``), and what the environment did not give.

    ``taken`` are the variables whose values were put into each text.
    """

    data: dict[str, Any]
    places: dict[Loc, str]
    unset: dict[Loc, str] = field(default_factory=dict)
    taken: dict[Loc, tuple[str, ...]] = field(default_factory=dict)

    def error(self, loc: Loc, problem: str) -> UsageError:
        """The error at ``loc``, placed where its nearest known surroundings stand, with the variables in its value."""
        known = next(loc[:end] for end in range(len(loc), -1, -1) if loc[:end] in self.places)
        names = self.taken.get(loc, ())
        problem += f" (from {', '.join(names)})" if names else ""
        return UsageError(": ".join(filter(None, (self.places[known], spell(loc), problem))))

    def get(self, loc: Loc) -> Any:
        """The value at ``loc``; raises LookupError where there is none."""
        value: Any = self.data
        for step in loc:
            fits = isinstance(value, list if isinstance(step, int) else dict)
            if not fits:
                raise LookupError(step)
            value = value[step]
        return value

    def put(self, steps: Sequence[str], value: Any, place: str) -> None:
        """Set a value from elsewhere than the file. Mappings on the way are made; list entries have to exist."""
        holder: Any = self.data
        loc: Loc = ()
        for step in steps:
            key = _key(holder, step)
            if key is None:
                raise UsageError(f"{place}: expected the path of a value, got {step} where {spell(loc)} has none")
            loc = (*loc, key)
            if len(loc) == len(steps):
                holder[key] = value
            elif isinstance(key, str) and holder.get(key) is None:
                holder[key] = {}
                self.places[loc] = place
            holder = holder[key]
        self.forget(loc)
        self.places[loc] = place

    def forget(self, loc: Loc) -> None:
        """Drop what is known of where the value at ``loc`` and all in it came from."""
        for known_by in (self.places, self.unset, self.taken):
            for known in [known for known in known_by if known[: len(loc)] == loc]:
                del known_by[known]


def _key(holder: Any, step: str) -> str | int | None:
    """How ``step`` is spelt as a key of ``holder``, or None where it cannot be one."""
    if isinstance(holder, dict):
        return step
    return int(step) if isinstance(holder, list) and step.isdecimal() and int(step) < len(holder) else None


def read_yaml(path: Path, env: Mapping[str, str]) -> Document:
    """Read a file that holds one YAML mapping. Raises UsageError that names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors like to begin with a byte-order mark
    except OSError as error:
        raise UsageError(f"{path}: expected a scenario file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = getattr(error, "problem", None) or getattr(error, "reason", "something else")
        raise UsageError(f"{path}:{line + 1}: expected valid YAML: {problem}") from None
    document = Document({}, {(): f"{path}:1"})
    data = _Reader(str(path), loader, env, document).value(root, (), ()) if root is not None else None
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise document.error((), f"expected keys such as name, models and stages, got {found}")
    document.data = data
    return document


def read_value(text: str, place: str) -> Any:
    """Read one YAML value from elsewhere than a file. Raises UsageError that names the place."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, LookupError, AttributeError):  # as in a file: !tag, 2025-13-01, !!bool x
        raise UsageError(f"{place}: expected a value that YAML can read") from None


def read_json(
    path: Path, expected: str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> tuple[Any, bytes]:
    """The value that a JSON file holds, and its bytes. Raises UsageError that names the file and, if it can, the line.

    ``expected`` is what the file should be; ``hook`` makes every object, as in ``json.loads``.
    """
    try:
        content = path.read_bytes()
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=hook), content
    except OSError as error:
        raise UsageError(f"{path}: expected {expected}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: expected valid JSON: {error.msg}") from None
    except RecursionError:  # a thousand brackets
        raise UsageError(f"{path}: expected {expected}, got lists or mappings nested too deep") from None
    except ValueError:  # not UTF-8, or a number of thousands of digits
        raise UsageError(f"{path}: expected JSON in UTF-8, got other bytes") from None


def shown_json(value: Any) -> str:
    """A value of a JSON file as it may stand in an error."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


class _Loader(yaml.SafeLoader):
    """Refuses, while it is composed, what is too deep or too much. An alias counts as what it names, in a merge too."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._extents: dict[int, tuple[int, int]] = {}  # of a node, by its id: how many values, how deep

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        self._refuse(1, self._depth, event)  # before Python's own stack ends
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.CollectionNode) and not isinstance(event, yaml.AliasEvent):
            inner = (
                node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            )
            extents = [self._extents.get(id(part), (1, 1)) for part in inner]
            values, depth = (
                1 + sum(values for values, _ in extents),
                1 + max((depth for _, depth in extents), default=0),
            )
            self._refuse(values, depth, event)
            self._extents[id(node)] = values, depth
        return node

    def _refuse(self, values: int, depth: int, event: yaml.Event) -> None:
        if depth > _MOST_DEPTH:
            problem = f"lists and mappings at most {_MOST_DEPTH} deep, got more"
        elif values > _MOST_VALUES:
            problem = f"at most {_MOST_VALUES:,} values, aliases counted as what they name, got more"
        else:
            return
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]


@dataclass(slots=True)
class _Reader:
    """Walks the node tree, because the tree knows lines and duplicate keys and the loaded data does not."""

    path: str
    loader: yaml.SafeLoader
    env: Mapping[str, str]
    document: Document

    def value(self, node: yaml.Node, loc: Loc, parents: tuple[yaml.Node, ...]) -> Any:
        self.document.places.setdefault(loc, self._place(node))
        if any(node is parent for parent in parents):
            raise self.document.error(loc, "expected a value, got an alias of what it is part of")
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(inner, (*loc, key), (*parents, node)) for key, inner in self._entries(node, loc)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(inner, (*loc, at), (*parents, node)) for at, inner in enumerate(node.value)]
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError):  # !tag, 2025-13-01, !!bool x, !!timestamp x
            raise self.document.error(loc, f"expected a plain value, got {node.value}") from None
        return self._expanded(value, loc) if isinstance(value, str) else value

    def _entries(self, node: yaml.MappingNode, loc: Loc) -> Iterator[tuple[str, yaml.Node]]:
        """Keys as they are spelt (``on`` is a key, not True) with ``<<`` merged in; each key may stand once."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{self._place(key)}: expected a plain key, got a list or mapping")
            if key.value in lines and key.value != "<<":
                first = f"got it here and on line {lines[key.value]}"
                raise UsageError(f"{self._place(key)}: {spell((*loc, key.value))}: expected this key once, {first}")
            lines[key.value] = line
        try:
            self.loader.flatten_mapping(node)
        except yaml.YAMLError:
            raise self.document.error(loc, "expected a mapping behind <<") from None
        for key, inner in node.value:
            self.document.places[(*loc, key.value)] = self._place(key)
            yield key.value, inner

    def _place(self, node: yaml.Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"

    def _expanded(self, text: str, loc: Loc) -> str:
        def replacement(match: re.Match[str]) -> str:
            literal, name, default = match.groups()
            if literal:
                return "${"
            value = self.env.get(name) or default  # set but empty counts as unset, as :- does in a shell
            if self.env.get(name):
                self.document.taken[loc] = (*self.document.taken.get(loc, ()), name)
            if value is None:
                self.document.unset.setdefault(loc, name)
                return ""
            return value

        return _VARIABLE.sub(replacement, text)
