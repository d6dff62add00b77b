"""The JSON Schema of recipes, for editors: docs/recipe.schema.json.

python docs/recipe_schema.py            # writes it
python docs/recipe_schema.py --check    # exit code 1 if it is not current

It is made from the models that recipes are read with, and from the merge methods that are installed.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mergekit_ray.config.fields import OutputOptions
from mergekit_ray.config.moe_recipe import ExpertRecipe, MoeRecipe
from mergekit_ray.config.recipe import DenseRecipe, InputModel, ModuleRecipe, SliceRecipe, SliceSource
from mergekit_ray.config.stages import StagedRecipe
from mergekit_ray.config.tokenizer import ModelTokenEmbedding, TokenEmbedding, TokenizerOptions, ZeroEmbedding
from mergekit_ray.core.registry import METHODS

FILE: Final = Path(__file__).with_name("recipe.schema.json")
URL: Final = "https://raw.githubusercontent.com/mergekit-ray/mergekit-ray/main/docs/recipe.schema.json"
MODELS: Final[tuple[type[BaseModel], ...]] = (
    DenseRecipe,
    InputModel,
    SliceRecipe,
    SliceSource,
    ModuleRecipe,
    MoeRecipe,
    ExpertRecipe,
    StagedRecipe,
    OutputOptions,
    TokenizerOptions,
    TokenEmbedding,
    ModelTokenEmbedding,
    ZeroEmbedding,
)
"""What a recipe consists of, in the order of the reference page."""

_NUMBER: Final = r"[+-]?([0-9][0-9_]*[.]?[0-9_]*|[.][0-9_]+)([eE][+-]?[0-9]+)?"
_BOOLEAN: Final = "([tT]rue|TRUE|[yY]es|YES|[oO]n|ON|[fF]alse|FALSE|[nN]o|NO|[oO]ff|OFF)"
_SCALAR: Final = {
    # An editor takes 1e-5 and yes for text, a recipe for a number and for true. No method has a parameter of text.
    "type": ["number", "boolean", "string"],
    "pattern": f"^ *({_NUMBER}|{_BOOLEAN}) *$",
}
_VALUE: Final = {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR, "minItems": 1}]}
_CASE: Final = {
    "type": "object",
    "properties": {"filter": {"type": ["string", "null"]}, "value": _VALUE},
    "required": ["value"],
    "additionalProperties": False,
}
_SETTING: Final = {
    "description": "A value, a gradient (a list of values from the first layer to the last), or a list of "
    "{filter, value}, of which the first counts whose filter matches the tensor's name.",
    "anyOf": [*_VALUE["anyOf"], _CASE, {"type": "array", "items": _CASE, "minItems": 1}, {"type": "null"}],
}


def build(methods: Sequence[str] | None = None) -> dict[str, Any]:
    """The schema, with these merge methods; None for all that are installed."""
    names = METHODS.names() if methods is None else list(methods)
    _, made = models_json_schema([(model, "validation") for model in MODELS])
    shared: dict[str, Any] = {}
    definitions = {name: _tidy(schema, shared) for name, schema in made["$defs"].items()}
    for model in MODELS:
        _describe(definitions[model.__name__], model)
    definitions["DenseRecipe"]["properties"]["merge_method"]["enum"] = names
    definitions["OutputOptions"] = {"anyOf": [{"type": "string", "minLength": 1}, definitions["OutputOptions"]]}
    is_moe = [
        {"required": ["experts"]},
        {"required": ["merge_method"], "properties": {"merge_method": {"const": "moe"}}},
    ]
    definitions["Stage"] = {
        "type": "object",
        "if": {"anyOf": is_moe},
        "then": {"$ref": "#/$defs/MoeRecipe"},
        "else": {"$ref": "#/$defs/DenseRecipe"},
    }
    staged = definitions["StagedRecipe"]["properties"]
    staged["stages"]["items"] = {"$ref": "#/$defs/Stage"}
    staged |= {key: definitions["DenseRecipe"]["properties"][key] for key in ("output", "name")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": URL,
        "title": "A recipe of mergekit-ray",
        "type": "object",
        "if": {"required": ["stages"]},
        "then": {"$ref": "#/$defs/StagedRecipe"},
        "else": {"$ref": "#/$defs/Stage"},
        "$defs": {**definitions, **shared, "Parameters": _parameters(names), "Setting": _SETTING},
    }


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a model says of each of its fields, by the name it has in YAML."""
    text = (inspect.getdoc(model) or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for names, said in re.findall(r"^    ([\w, ]+): (.+(?:\n {8}.+)*)", text, re.MULTILINE):
        for name in names.split(", "):
            key = model.model_fields[name].alias or name
            plain = re.sub(r"\s+", " ", said).removeprefix(f"written ``{key}``: ").replace("``", "`")
            found[key] = plain[0].upper() + plain[1:]
    return found


def _parameters(names: Sequence[str]) -> dict[str, Any]:
    """The parameters of all methods: which method takes which is for `mergekit-ray validate` to say."""
    meanings: dict[str, dict[str, list[str]]] = {}
    for method in map(METHODS.get, names):
        for declared in (method.model_parameters, method.global_parameters):
            for key, field in declared.model_fields.items():
                said = meanings.setdefault(field.alias or key, {})
                said.setdefault(field.description or "", []).append(method.name)
    properties = {
        name: {
            "description": "\n".join(f"{', '.join(sorted(of))}: {what}" for what, of in said.items()),
            "$ref": "#/$defs/Setting",
        }
        for name, said in sorted(meanings.items())
    }
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _tidy(schema: Any, shared: dict[str, Any]) -> Any:
    """A part of the schema without pydantic's titles; what recurs is moved to ``shared``."""
    if isinstance(schema, list):
        return [_tidy(item, shared) for item in schema]
    if not isinstance(schema, dict):
        return schema
    title = schema.get("title")
    if title == "Parameters" and schema["type"] == "object":
        return {"$ref": "#/$defs/Parameters"}
    tidied = {
        key: {name: _tidy(each, shared) for name, each in value.items()}
        if key == "properties"
        else _tidy(value, shared)
        for key, value in schema.items()
        if not (key == "title" or (key == "default" and value is None))
    }
    if title == "Model" and "anyOf" in schema and not any(each == {"type": "null"} for each in schema["anyOf"]):
        within = {"model": {"$ref": "#/$defs/Model"}, "lora": {"anyOf": [{"$ref": "#/$defs/Model"}, {"type": "null"}]}}
        tidied["anyOf"][1]["properties"] |= within
        shared["Model"] = tidied
        return {"$ref": "#/$defs/Model"}
    return tidied


def _describe(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Put the docstring's words to the fields; a field that need not be given may be null."""
    body = next((each for each in schema.get("anyOf", ()) if "properties" in each), schema)
    schema.pop("description", None)
    body["description"] = (inspect.getdoc(model) or "").partition("\n\n")[0].replace("``", "`")
    said = descriptions(model)
    for key, each in body["properties"].items():
        takes_null = {"type": "null"} in each.get("anyOf", ()) or "null" in each.get("type", ()) or "$ref" in each
        if key not in body.get("required", ()) and not takes_null:
            default = {"default": each.pop("default")} if "default" in each else {}
            body["properties"][key] = {"anyOf": [each, {"type": "null"}], **default}
        if key in said:
            body["properties"][key]["description"] = said[key]


def text(methods: Sequence[str] | None = None) -> str:
    """The content of the file."""
    return json.dumps(build(methods), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(FILE.read_text() != text())
    FILE.write_text(text())
