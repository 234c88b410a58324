"""The JSON schema of the study file, for completion and checks in editors. Names come from the registries."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec, Lora, Mixture
from autopeft.search_space.adapters.mixture import MIXTURE_FIELDS
from autopeft.search_space.declaration import GRANULARITIES, VARIATIONS
from autopeft.search_space.metrics import QUALITIES, SEPARATOR
from autopeft.search_space.problem import METRICS
from autopeft.search_space.routers import ROUTERS
from autopeft.studies.config.declaration import scalar_type
from autopeft.studies.config.study_file import StudyFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12), with a definition per adapter type that has the fields of this type."""
    from autopeft.evaluators.tasks import TASKS
    from autopeft.evaluators.training.registry import EVALUATORS
    from autopeft.search_space.spaces.presets import PRESETS
    from autopeft.search_space.spaces.rules import ALL_BASELINES
    from autopeft.searchers import SEARCHERS

    schema = StudyFile.model_json_schema()
    _restrict(schema["properties"]["task"], TASKS)
    definitions = schema["$defs"]
    search = definitions["SearchSettings"]["properties"]
    _restrict(search["searcher"], SEARCHERS)
    _restrict(definitions["EvaluationSettings"]["properties"]["evaluator"], EVALUATORS)
    _restrict(definitions["SpaceSettings"]["properties"]["preset"]["anyOf"][0], PRESETS)
    by_name = next(form for form in search["start"]["items"]["oneOf"] if form["type"] == "string")
    _restrict(by_name, ALL_BASELINES)
    _restrict(definitions["BaselineSettings"]["properties"]["names"]["items"], ALL_BASELINES)
    schema["properties"]["metrics"]["anyOf"][0]["additionalProperties"] = False
    lists = {"objectives": schema["properties"]["objectives"], "report": schema["properties"]["report"]["anyOf"][0]}
    # A study with its own metrics may name them, and a schema cannot know their names.
    schema["if"] = {"required": ["metrics"]}
    for key, any_name in (("then", {"type": "string"}), ("else", _names_of_metrics())):
        schema[key] = {"properties": {}}
        for name, entries in lists.items():
            section = definitions[entries["items"]["$ref"].rpartition("/")[2]]
            own = f"{section['title']}.{key}"
            definitions[own] = deepcopy(section)
            described = {"description": section["properties"]["name"]["description"]}
            definitions[own]["properties"]["name"] = {**any_name, **described}
            schema[key]["properties"][name] = {"items": {"anyOf": [any_name, {"$ref": f"#/$defs/{own}"}]}}
    for entries in lists.values():
        del definitions[entries.pop("items")["$ref"].rpartition("/")[2]]
    common = definitions.pop("AdapterSettings")["properties"]
    for kind, spec in ADAPTERS.items():
        definitions[f"adapter.{kind}"] = _adapter(spec, common)
    adapters = definitions["SpaceSettings"]["properties"]["adapters"]
    definitions["adapter"] = {"anyOf": [_with_kind(kind) for kind in ADAPTERS]}
    named = {"$ref": "#/$defs/adapter"}
    # The name of an entry is its adapter type, unless `kind` is set.
    adapters["properties"] = {
        kind: {"if": {"required": ["kind"]}, "then": named, "else": {"$ref": f"#/$defs/adapter.{kind}"}}
        for kind in ADAPTERS
    }
    adapters["additionalProperties"] = named
    (pattern,) = adapters.pop("patternProperties")  # the general section, which `_adapter` has split by type
    adapters["propertyNames"] = {"pattern": pattern}
    return {"$schema": DIALECT, **schema, "title": "autopeft study file"}


def _restrict(text: dict[str, Any], names: Iterable[str]) -> None:
    """Allow registered names only; an empty list is not a valid schema."""
    if names := list(names):
        text["enum"] = names


def _names_of_metrics() -> dict[str, Any]:
    """Return the schema of the name of a metric, with or without a domain."""
    qualities = "|".join(map(re.escape, QUALITIES))
    by_domain = {"type": "string", "pattern": f"^({qualities}){SEPARATOR}.+$"}
    return {"anyOf": [{"type": "string", "enum": list(METRICS)}, by_domain]}


def _with_kind(kind: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/adapter.{kind}", "properties": {"kind": {"const": kind}}, "required": ["kind"]}


def _adapter(spec: type[AdapterSpec], common: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(spec)
    own = {f.name: _field(hints[f.name], f.default) for f in fields(spec) if f.name != "given"}
    if spec.can_be_expert:
        hints = get_type_hints(Mixture)
        own |= {f.name: _field(hints[f.name], f.default) for f in fields(Mixture) if f.name in MIXTURE_FIELDS}
        own["experts"]["default"] = 0
        own["router"]["description"] = "; ".join(f"{r.name}: {r.summary} ({r.source})" for r in ROUTERS.values())
    vary = {name: {"type": "string", "enum": list(GRANULARITIES)} for name in own}
    if spec is Lora:
        vary["rank"]["enum"] = list(VARIATIONS)
    at = {"type": "array", "items": {"type": "string", "enum": list(spec.roles)}}
    return {
        "type": "object",
        "description": f"{spec.summary} ({spec.source})",
        "additionalProperties": False,
        "properties": {
            **common,
            "at": {**at, "description": common["at"]["description"], "default": list(spec.default_roles)},
            "vary": {
                "type": "object",
                "description": common["vary"]["description"],
                "additionalProperties": False,
                "properties": vary,
            },
            **own,
        },
    }


def _field(hint: Any, default: Any) -> dict[str, Any]:
    """Return the schema of a field: a value, a list of values, or a range of numbers."""
    scalar = scalar_type(hint)
    value = {"type": _TYPES[scalar]} if scalar else {"type": ["number", "string", "boolean"]}
    forms: list[dict[str, Any]] = [value, {"type": "array", "items": value, "minItems": 1}]
    if scalar not in (bool, str):
        forms.append({"$ref": "#/$defs/Range"})
    return {"anyOf": forms} | ({} if default is MISSING else {"default": default})
