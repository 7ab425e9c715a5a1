"""JSON schemas as people write them, at random, and such as are meant to do harm."""

import random
import string
from typing import Any

Schema = dict[str, Any]

FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "uri")
PATTERNS = ("^[A-Z]{3}-[0-9]{2}$", "^(red|green|blue)$", "^[a-z]+(_[a-z]+)*$", "^\\d{1,5}$")


def random_schema(rng: random.Random) -> Schema:
    """Of an object, with whatever of the usual keywords."""
    schema = _object(rng, 3)
    if rng.random() < 0.3:
        after = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": after}, "required": ["v"]}
        schema["$defs"] = {"node": node}
        schema["properties"]["list"] = {"$ref": "#/$defs/node"}
    return schema


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["name", "age", "tags", "kind", "size", "owner", "é", 'a "b"', "x y", "id"], k=rng.randint(1, 5))
    schema: Schema = {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    if rng.random() < 0.8:
        schema["additionalProperties"] = rng.choice([False, False, {"type": "integer"}])
    return schema


def _value(rng: random.Random, depth: int) -> Schema:
    kinds = [_text, _number, _choice, _constant]
    if depth > 0:
        kinds += [_list, _tuple, lambda rng: _object(rng, depth), _union]
    if depth > 0 and rng.random() < 0.2:
        return {"type": "array", "items": _value(rng, depth - 1), "maxItems": rng.randint(1, 3)}
    return rng.choice(kinds)(rng)


def _text(rng: random.Random) -> Schema:
    least = rng.randint(0, 3)
    return rng.choice([
        {"type": "string"},
        {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 9)},
        {"type": "string", "format": rng.choice(FORMATS)},
        {"type": "string", "pattern": rng.choice(PATTERNS)},
    ])  # fmt: skip


def _number(rng: random.Random) -> Schema:
    least = rng.randint(-100, 100)
    return rng.choice([
        {"type": "integer"},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"]},
        {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 1000)},
        {"type": "number", "exclusiveMinimum": least, "maximum": least + 2.5},
        {"type": "integer", "multipleOf": rng.randint(2, 12)},
    ])  # fmt: skip


def _choice(rng: random.Random) -> Schema:
    return {"enum": rng.sample(["a", "b b", "ü", 1, -2.5, None, True, ["x"], {"k": "v"}], k=rng.randint(1, 4))}


def _constant(rng: random.Random) -> Schema:
    return {"const": rng.choice(["fixed", 7, None, False, [1, 2], {"a": {"b": []}}])}


def _list(rng: random.Random) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _value(rng, 0), "minItems": least, "maxItems": least + rng.randint(0, 3)}


def _tuple(rng: random.Random) -> Schema:
    return {"type": "array", "prefixItems": [_value(rng, 0) for _ in range(2)], "items": False, "minItems": 2}


def _union(rng: random.Random) -> Schema:
    return {"anyOf": [_value(rng, 0) for _ in range(rng.randint(2, 3))]}


def harmful_schemas() -> dict[str, Schema]:
    rng = random.Random(0)
    deep: Schema = {"type": "string"}
    for _ in range(90):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    words = ["".join(rng.choices(string.ascii_lowercase, k=12)) for _ in range(60_000)]
    return {
        "nested deep": deep,
        "huge enum": {"enum": words},
        "1 MB": {"type": "object", "description": "x" * 2**20},
        "many properties": {"type": "object", "properties": {word: {"type": "integer"} for word in words[:5000]}},
        "refers to itself": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "exponential alternatives": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(6)]} for i in range(8)
            ]
        },
        "states of multiples": {"allOf": [{"type": "integer", "multipleOf": factor} for factor in (997, 991, 983)]},
        "long regex": {"type": "string", "pattern": r"^(\w*\d*)" + r"\w*\d*" * 5000 + "$"},
    }
