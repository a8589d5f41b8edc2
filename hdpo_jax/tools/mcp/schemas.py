"""Schemas as MCP servers describe their tools, made plain: small, without references, quick to check.

What is left out is for the server to judge, which has to check its arguments anyway. A pattern could take forever to
match, and holds the interpreter meanwhile; a reference may be remote, or lead to itself.
"""

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.validators import validator_for

MAX_CHARS = 16_384
"""Of a schema in JSON, as it is shown to the policy."""
MAX_SOURCE_CHARS = 262_144
"""Of a schema in JSON, as a server sends it."""
MAX_DEPTH = 8
"""Of schemas in schemas; what is deeper may be anything."""
MAX_SCHEMAS = 256
"""In one: references can multiply. What comes after them may be anything."""
MAX_TEXT = 2_000
"""Characters of a description."""

_KEPT = frozenset(
    {"type", "enum", "const", "default", "format", "required", "minimum", "maximum", "exclusiveMinimum"}
    | {"exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems"}
)
_ANNOTATIONS = frozenset({"description", "default", "title", "examples", "deprecated", "$comment"})


class BrokenSchema(ValueError):
    """Says what is wrong, in a few words."""


def plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of an object that accepts all that the given one does. Raises BrokenSchema for what is none."""
    try:
        if len(json.dumps(schema)) > MAX_SOURCE_CHARS:
            raise BrokenSchema("it is too long")
        validator_for(schema, Draft202012Validator).check_schema(schema)
        found: dict[str, Any] = {"properties": {}, **_Plain(schema).of(schema), "type": "object"}
        Draft202012Validator.check_schema(found)
    except SchemaError as error:
        raise BrokenSchema(cleaned(error.message)[:200]) from error
    except RecursionError:
        raise BrokenSchema("it is nested too deeply") from None
    except (AttributeError, KeyError, TypeError):
        # A reference may lead to anything in the document.
        raise BrokenSchema("it has a reference to what is no schema") from None
    if len(json.dumps(found)) > MAX_CHARS:
        raise BrokenSchema(f"it is longer than {MAX_CHARS} characters")
    return found


def cleaned(text: str) -> str:
    """Without control characters, those that change the direction of text among them; cut to a length."""
    kept = "".join(mark for mark in text if mark in "\n\t" or unicodedata.category(mark) not in ("Cc", "Cf", "Cs"))
    return kept if len(kept) <= MAX_TEXT else f"{kept[:MAX_TEXT]} […]"


class _Plain:
    """Makes the schemas of one document plain."""

    def __init__(self, document: Mapping[str, Any]):
        self._document = document
        self._left = MAX_SCHEMAS

    def of(self, schema: Any, depth: int = 0) -> dict[str, Any]:
        self._left -= 1
        if schema is False:
            return {"enum": []}
        if schema is True or depth > MAX_DEPTH or self._left < 0:
            return {}
        found = {key: value for key, value in schema.items() if key in _KEPT}
        if "description" in schema:
            found["description"] = cleaned(schema["description"])
        if "properties" in schema:
            found["properties"] = {name: self.of(part, depth + 1) for name, part in schema["properties"].items()}
        # Without what stands beside them these two would forbid more.
        if "patternProperties" not in schema and "additionalProperties" in schema:
            found["additionalProperties"] = self._of_rest(schema["additionalProperties"], depth)
        if "prefixItems" not in schema and isinstance(schema.get("items"), Mapping | bool):
            found["items"] = self._of_rest(schema["items"], depth)
        # Of alternatives that accept more than they did, several may fit.
        if alternatives := schema.get("anyOf", schema.get("oneOf")):
            found["anyOf"] = [self.of(part, depth + 1) for part in alternatives]
        together = [self.of(part, depth + 1) for part in schema.get("allOf", ())]
        if "$ref" in schema:
            target = self.of(self._target(schema["$ref"]), depth + 1)
            if schema.keys() - {"$ref"} <= _ANNOTATIONS:
                return target | found
            together.append(target)
        return found | ({"allOf": together} if together else {})

    def _of_rest(self, schema: Mapping[str, Any] | bool, depth: int) -> dict[str, Any] | bool:
        return schema if isinstance(schema, bool) else self.of(schema, depth + 1)

    def _target(self, reference: str) -> Any:
        """What a reference within the document leads to."""
        if not reference.startswith("#"):
            raise BrokenSchema("it refers to another document")
        found: Any = self._document
        for part in reference[1:].split("/")[1:]:
            found = found[part.replace("~1", "/").replace("~0", "~")]
        return found
