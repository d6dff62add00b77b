r"""How a recipe names a model: ``path-or-repo[@revision][+lora]``.

    org/model                          a repository of the Hub
    org/model@v1.0                     at a branch, tag or commit
    org/model@main+org/adapter@v2      with a LoRA applied
    ./some folder/model                a folder
    s3://bucket/prefix                 a prefix of a bucket
    hf://org/model                     a repository, said explicitly

Folders written as ``/…``, ``./…``, ``../…``, ``~…`` and every URI but ``hf://`` have no revisions, so an ``@`` in
them is an ordinary character. Where a path holds a ``+`` (or a repository an ``@``), write ``\+`` (``\@``) or the
mapping form ``{path: …, revision: …, lora: …}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from mergekit_ray.config.findings import found
from mergekit_ray.core.secrets import holds_credential
from mergekit_ray.core.spelling import nearest

IGNORED_KEYS = frozenset({"override_architecture"})
"""Keys of the mapping form that mergekit has and that mean nothing here: layers are read off the headers."""

_KEYS = ("model", "path", "revision", "lora")
_UNREVISIONED = re.compile(r"/|\.{1,2}(/|$)|~|(?!hf:)[A-Za-z][A-Za-z0-9+.-]*://")
_SCHEME_WITHOUT_SLASHES = re.compile(r"(hf|s3|https?|file):/?(?!/)(?=.)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model as a recipe names it. Nothing is looked up; two references are equal if they are spelt alike.

    Attributes:
        path: folder, Hub repository or URI, without a trailing slash.
        revision: branch, tag or commit of a Hub repository; None for its default or where there are none.
        lora: the adapter applied to it, which has no adapter of its own.
    """

    path: str
    revision: str | None = None
    lora: ModelReference | None = None

    def __post_init__(self) -> None:
        """Check the parts.

        Raises:
            ValueError: an empty part, a control character, a revision of something that has none, or two adapters.
        """
        for part, text in (("path", self.path), ("revision", self.revision)):
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f"a model's {part} is text, found {text!r}; quote it")
            if not text.strip():
                raise ValueError(f"a model's {part} is empty")
            if _CONTROL.search(text):
                raise ValueError(f"a model's {part} holds a control character: {text[:60]!r}")
            _check_no_credential(text)
        stripped = self.path.strip()
        if unslashed := _SCHEME_WITHOUT_SLASHES.match(stripped):
            uri = f"{unslashed[1]}://{stripped[unslashed.end() :]}"
            raise ValueError(f"{stripped!r} has no `//` after the colon\nwrite {uri}; a folder is ./{stripped}")
        slashed = re.fullmatch(r"(.*[^/:\s])[/\s]*", stripped)  # not the slashes of `/` and `s3://`
        path = slashed[1] if slashed else stripped
        # Of a folder, slashes in a row are one; keys of a store may hold several.
        object.__setattr__(self, "path", path if "://" in path else re.sub("/{2,}", "/", path))
        if self.revision is not None:
            if _UNREVISIONED.match(self.path):
                raise ValueError(f"{self.path!r} is not on the Hub, so it has no revision {self.revision!r}")
            object.__setattr__(self, "revision", self.revision.strip())
        if self.lora is not None and self.lora.lora is not None:
            raise ValueError(f"a model takes one LoRA, found two on {self.path!r}")

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Read the string form; the inverse of ``str``.

        Raises:
            ValueError: a part is empty, there are two adapters, or a URI holds a credential.
        """
        _check_no_credential(text)  # it may hold an `@` or a `+`
        parts = _split(text, "+")
        if len(parts) > 2:
            raise ValueError(f"more than one LoRA in {text[:80]!r}; write \\+ for a plus sign that is part of a path")
        model, *adapters = (_parse_part(part) for part in parts)
        return cls(model.path, model.revision, adapters[0] if adapters else None)

    @classmethod
    def from_data(cls, value: object) -> ModelReference:
        """Read any form a recipe may hold: a string, a path, ``{path, revision, lora}`` or ``{model: …, lora: …}``.

        Raises:
            ValueError: none of these.
        """
        if isinstance(value, ModelReference):
            return value
        if isinstance(value, PurePath):
            return cls(str(value) if value.is_absolute() else f"./{value}")
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping):
            hint = "\nquote it" if isinstance(value, int | float) and not isinstance(value, bool) else ""
            wanted = "expected a model such as org/name, a folder or s3://bucket/prefix"
            raise ValueError(f"{wanted}, found {found(value)}{hint}")
        for key in value:
            if key not in _KEYS and key not in IGNORED_KEYS:
                raise ValueError(
                    f"unknown key {key!r} in a model{nearest(str(key), _KEYS)}; accepted: {', '.join(_KEYS)}"
                )
        if ("model" in value) == ("path" in value):
            raise ValueError("a model written as a mapping has either `path` or `model`")
        inner = cls(value["path"]) if "path" in value else cls.from_data(value["model"])
        revision = value.get("revision")
        if revision is not None and inner.revision is not None:
            raise ValueError(f"two revisions of {inner.path!r}: {inner.revision!r} and {revision!r}")
        lora = value.get("lora")
        if lora is not None and inner.lora is not None:
            raise ValueError(f"a model takes one LoRA, found two on {inner.path!r}")
        adapter = inner.lora if lora is None else cls.from_data(lora)
        return cls(inner.path, inner.revision if revision is None else revision, adapter)

    def __str__(self) -> str:
        text = escaped(self.path)
        if self.revision is not None:
            text += "@" + re.sub(r"[\\+]", r"\\\g<0>", self.revision)
        return text if self.lora is None else f"{text}+{self.lora}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Any form on the way in, the string form on the way out."""
        del source, handler
        return core_schema.no_info_plain_validator_function(
            cls.from_data, serialization=core_schema.to_string_ser_schema(when_used="always")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The string form and the mapping, whose ``model`` and ``lora`` are models again."""
        del schema, handler
        text = {"type": "string", "minLength": 1}
        keys: JsonSchemaValue = dict.fromkeys((*_KEYS, *sorted(IGNORED_KEYS)), True)
        keys |= {"path": text, "revision": {"type": ["string", "null"]}}
        either = [{"required": ["path"]}, {"required": ["model"]}]
        mapping = {"type": "object", "properties": keys, "additionalProperties": False, "oneOf": either}
        return {"title": "Model", "anyOf": [text, mapping]}


def escaped(path: str) -> str:
    """How a recipe writes a path whose characters would mean something else."""
    return re.sub(r"[\\+]" if _UNREVISIONED.match(path) else r"[\\+@]", r"\\\g<0>", path)


def _check_no_credential(text: str) -> None:
    if "://" in text and holds_credential(text):
        raise ValueError(
            "a model's URI must not hold a credential; take it out, and set it in the environment: HF_TOKEN, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _split(text: str, separator: str, limit: int = -1) -> list[str]:
    """Split at unescaped separators, leaving escapes in place."""
    parts: list[str] = []
    current: list[str] = []
    position = 0
    while position < len(text):
        char = text[position]
        if char == "\\" and position + 1 < len(text) and text[position + 1] in "\\+@":
            current.append(text[position : position + 2])
            position += 2
            continue
        if char == separator and limit != len(parts):
            parts.append("".join(current))
            current = []
        else:
            current.append(char)
        position += 1
    return [*parts, "".join(current)]


def _parse_part(text: str) -> ModelReference:
    text = text.strip()
    path, *revision = [text] if _UNREVISIONED.match(text) else _split(text, "@", 1)
    if not path.strip():
        raise ValueError("a model's path is empty")
    return ModelReference(_unescape(path), _unescape(revision[0]) if revision else None)


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\+@])", r"\1", text)
