"""The text of a configuration file: what it says, and what is wrong in which line. As the file may have passwords and
keys, also in the wrong places, no message repeats what could be one."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from buddy_server.errors import ConfigError, shown

_WITHOUT_SECRETS = ("tiers", "engine", "elastic", "max_waiting", "allow_open")
"""Fields whose values may be shown, with all that is below them."""
_NAME = re.compile(r"(?!sk-)[A-Za-z0-9._\[\]-]{1,40}")
"""What is no URL and no key: those begin with "sk-" or are longer."""
_QUOTED_NAME = re.compile(r"(alias|anchor|tag|handle) ['\"].*")


def read_yaml(path: Path) -> tuple[str, Any]:
    """The file's text and what it says. Raises ConfigError naming the file, and the line if it is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not YAML: byte {error.start} is not UTF-8") from None
    try:
        loader = _Loader(text)
        try:
            return text, loader.get_single_data()
        finally:
            loader.dispose()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: is not YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}:{_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is not allowed: it is nested too deeply") from None


def explain(details: Any, text: str) -> str:
    """One of pydantic's error details, as "LINE: FIELD: reason"."""
    location = tuple(map(str, details["loc"]))
    is_public = bool(location) and location[0] in _WITHOUT_SECRETS
    field = ".".join(location if is_public else map(name_or_mask, location)) or "the file"
    where = f"{line_of(text, location)}: {field}"
    if details["type"] == "extra_forbidden":
        return f"{where}: is not a known field"
    if details["type"] == "missing":
        return f"{where}: is required"
    if "key_sha256" in location:
        return f"{where}: allowed are SHA-256 digests in 64 lower-case hexadecimal digits"
    if field == "store.url":
        return f"{where}: allowed is sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
    if field == "limits.url":
        return f"{where}: allowed is memory:// or redis://HOST:PORT/NUMBER"
    value = shown(details["input"]) if is_public or isinstance(details["input"], int | float) else "this value"
    return f"{where}: {value} is not allowed: {_reason(details)}"


def name_or_mask(text: str) -> str:
    """`text`, or a mask if it may be something other than a name."""
    return text if _NAME.fullmatch(text) else "[not shown]"


def line_of(text: str, location: tuple[str, ...]) -> int:
    """The line, from 1, of the field at `location`, or of the deepest entry on the way to it that there is."""
    node, line = yaml.compose(text), 1
    for name in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == name]
        elif isinstance(node, yaml.SequenceNode) and name.isdigit() and int(name) < len(node.value):
            found = [(node.value[int(name)],) * 2]
        else:
            break
        if not found:
            break
        key, node = found[-1]
        line = key.start_mark.line + 1
    return line


class _Loader(yaml.SafeLoader):
    """Knows the line of a value that looks like a date or a number and is none, as 2026-13-45, and of a field that is
    given twice, where PyYAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                line = first[key.tag, key.value].start_mark.line + 1
                problem = f"{name_or_mask(key.value)} is given twice, first in line {line}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            # PyYAML raises the last two for tags, as in `!!bool maybe`.
            problem = "a value is neither the date nor the number that it looks like; a text like this needs quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    """As "LINE: reason"; the error's own text would have the line from the file."""
    # PyYAML's errors all have these, except for its type hints.
    assert error.problem is not None
    assert error.problem_mark is not None
    problem = _QUOTED_NAME.sub(r"\1", error.problem)
    if error.context_mark is not None and error.context_mark.line != error.problem_mark.line:
        problem += f", in what begins in line {error.context_mark.line + 1}"
    return f"{error.problem_mark.line + 1}: is not YAML: {problem}"


def _reason(details: Any) -> str:
    if details["type"] in ("model_type", "dict_type"):
        return "allowed is a mapping like {NAME: VALUE}"
    return str(details["ctx"]["error"]) if details["type"] == "value_error" else str(details["msg"])
