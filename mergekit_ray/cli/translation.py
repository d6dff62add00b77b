"""What a command line of mergekit is in commands of ours. Reads the recipe, and headers of models, where it must."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from mergekit_ray.cli.mergekit_options import OPTIONS, Option
from mergekit_ray.config.yaml_source import STAGES, read_yaml
from mergekit_ray.core.errors import ConfigError

_BYTES_PER_PARAMETER: Final = 2
_NUMBER: Final = re.compile(r"(\d+)([KMB]?)", re.IGNORECASE)
_MANY: Final = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_MAX_RANK: Final = 128
"""The default of mergekit-extract-lora."""


@dataclass
class Translation:
    """A command of ours.

    Attributes:
        words: of it, without `mergekit-ray`; empty if there is nothing left to run. A recipe that is no file stands
            among them as a text.
        shown: how a user types it, if other than `words`.
        notes: what options are that have no counterpart: for each explanation, the options as they were given.
        environ: variables that are set for it.
        prints: to standard output first.
    """

    words: list[str] = field(default_factory=list)
    shown: str = ""
    notes: dict[str, list[str]] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    prints: str = ""

    def note(self, given: str, told: str) -> None:
        """Explain an option."""
        self.notes.setdefault(told, []).append(given)

    def told(self) -> str:
        """The command, and the notes below it."""
        settings = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environ.items())
        lines = [f"mergekit-ray: this is: {settings}{self.shown or typed(self.words)}"]
        return "\n".join([*lines, *(f"  {', '.join(names)}: {told}" for told, names in self.notes.items())])


def typed(words: Sequence[str]) -> str:
    """A command of ours as a user types it."""
    return shlex.join(words if words[0] == "merge" else ["mergekit-ray", *words])


def translate(command: str, given: Mapping[str, Any]) -> Translation:
    """Say what a command line of mergekit is here.

    Args:
        command: mergekit's, without `mergekit-`.
        given: its arguments in lower case, its options by `Option.key`, and our ``overwrite``; None is what was not
            given.

    Raises:
        MergekitRayError: it asks for what is not there, or what must be read for it cannot be read.
    """
    found = Translation()
    more = [word for option in OPTIONS[command] for word in _words(option, given.get(option.key), found)]
    more += ["--overwrite"] if given.get("overwrite") else []
    device = _device(given)
    more += [] if device is None else ["--device", device]
    if given.get("out_shard_size") is not None and command != "extract-lora":
        more += ["--max-shard-size", _shard_size(given["out_shard_size"])]
        found.note("--out-shard-size", "parameters in mergekit, bytes here: two for each, as in bfloat16")
    if given.get("transformers_cache") is not None:
        found.environ["HF_HUB_CACHE"] = given["transformers_cache"]
    _TRANSLATED.get(command, _merge)(found, given, more)
    return found


def _device(given: Mapping[str, Any]) -> str | None:
    """The device that is asked for: the named one, before a switch."""
    if given.get("device") is not None:
        return str(given["device"])
    if given.get("cuda") or given.get("gpu_rich"):
        return "cuda"
    return "cpu" if given.get("cuda") is False else None


def _words(option: Option, value: Any, found: Translation) -> list[str]:
    """Our words for an option; where there are none, a note."""
    if value is None or option.own:
        return []
    if value is False:
        off = max(option.off, key=len)
        if option.off_refused:
            raise ConfigError(f"{off} is {option.off_here}", remedy=f"leave out {off}")
        if option.off_here:
            found.note(off, option.off_here)
        return []
    if option.words:
        return [word.format(value) for word in option.words]
    found.note(option.names[0] if option.names == ("-v",) else max(option.names, key=len), option.here)
    return []


def _shard_size(size: str) -> str:
    """Our limit for a number of parameters such as ``5B``."""
    from mergekit_ray.config.sizes import format_size

    match = _NUMBER.fullmatch(size.strip())
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"--out-shard-size: expected a number of parameters such as 5B, found {size!r}",
            remedy="write a whole number, which may end with K, M or B",
        )
    return format_size(int(match[1]) * _MANY[match[2].upper()] * _BYTES_PER_PARAMETER)


# -- commands ---------------------------------------------------------------------------------------------------------


def _merge(found: Translation, given: Mapping[str, Any], more: list[str]) -> None:
    found.words = ["merge", given["config"], given["out"], *more]


def _multi(found: Translation, given: Mapping[str, Any], more: list[str]) -> None:
    """Every stage that no other merges is written: one without a name to `--out-path`, others beside each other."""
    config, folder, out = given["config"], Path(given["intermediate_dir"]), given["out_path"]
    data = read_yaml(_text(config), config).data
    stages = data.get(STAGES) if isinstance(data, dict) and STAGES in data else [data]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        found.words = ["merge", config, out or str(folder), *more]  # which says what is wrong with the recipe
        return
    unused = [stage for stage in stages if not any(_uses(other, stage) for other in stages if other is not stage)]
    last = next((stage for stage in unused if stage.get("name") is None), (unused or stages)[-1])
    if last.get("name") is None and out is None:
        raise ConfigError(
            "a stage has no name, and nothing says where it goes", where=config, remedy="add --out-path OUT"
        )
    target = out if last.get("name") is None else str(folder / str(last["name"]))
    if out is not None and target != out:
        found.note("--out-path", f"not used: all stages have names, so the last one goes to {target}")
    others = [stage for stage in unused if stage is not last]
    if not others or any(stage.get("name") is None for stage in others):
        found.words = ["merge", config, target, *more]
        return
    for stage in others:
        stage.setdefault("output", {"path": str(folder / str(stage["name"]))})
    ordered = [*(stage for stage in stages if stage is not last), last]
    _merge_text(found, yaml.safe_dump({STAGES: ordered}, sort_keys=False), target, more)


_MODEL_KEYS: Final = frozenset({"model", "path", "base_model", "source_model", "source", "tokenizer_source"})


def _uses(data: Any, stage: Mapping[str, Any]) -> bool:
    """Whether a part of a recipe names a stage as a model."""
    if isinstance(data, list):
        return any(_uses(value, stage) for value in data)
    if not isinstance(data, dict):
        return False
    named = any(data.get(key) == stage.get("name") for key in _MODEL_KEYS if data.get(key) is not None)
    return named or any(_uses(value, stage) for value in data.values())


def _pytorch(found: Translation, given: Mapping[str, Any], more: list[str]) -> None:
    config, out = given["config"], given["out"]
    # With both options, mergekit takes the intersection.
    wanted = "intersection" if given["tensor_intersection"] else "union" if given["tensor_union"] else None
    if wanted is None:
        _merge(found, given, more)
        return
    text, key = _text(config), f"tensors: {wanted}"
    if text.lstrip().startswith("{"):  # YAML in JSON's style takes no line at its end
        _merge_text(found, yaml.safe_dump({**read_yaml(text, config).data, "tensors": wanted}), out, more)
        return
    found.words = ["merge", f"{text}\n{key}\n", out, *more]
    source = f"{{ cat {shlex.quote(config)}; echo; echo {shlex.quote(key)}; }}"
    found.shown = f"{source} | {typed(['merge', '-', out, *more])}"


def _extract_lora(found: Translation, given: Mapping[str, Any], more: list[str]) -> None:
    if given["sv_epsilon"]:
        raise ConfigError(
            "--sv-epsilon, a bound for singular values, is not supported",
            remedy="leave it out, or run `mergekit-ray extract-lora FINETUNED BASE OUT --energy SHARE`, which keeps a "
            "share of each change's squared norm",
        )
    from mergekit_ray.cli.translated_modules import modules

    place = [given["model"], given["base_model"]]
    saved, excluded = modules(
        *place,
        saved=given["save_module"] or (),
        excluded=given["exclude_regex"] or (),
        included=given["include_regex"] or (),
        embeddings=bool(given["embed_lora"]),
    )
    rank = given["max_rank"]
    found.words = ["extract-lora", *place, given["out_path"], "--rank", str(_MAX_RANK if rank is None else rank)]
    found.words += ["--embeddings"] if given["embed_lora"] else []
    found.words += [word for name in saved for word in ("--modules-to-save", name)]
    found.words += [word for name in excluded for word in ("--exclude", name)]
    found.words += more


def _tokensurgeon(found: Translation, given: Mapping[str, Any], more: list[str]) -> None:
    from mergekit_ray.config.transplant import SUBWORD, methods
    from mergekit_ray.core.approximation import APPROXIMATIONS

    method = given["approximation_method"] or "omp"
    if method not in methods():
        raise ConfigError(f"--approximation-method {method} is not supported", remedy=f"here: {', '.join(methods())}")
    metric = None if given["cosine_similarity"] is None else "cosine" if given["cosine_similarity"] else "euclidean"
    taken = ("subword",) if method == SUBWORD else tuple(APPROXIMATIONS.get(method).parameters.model_fields)
    found.words = ["transplant", given["model"], given["donor"], given["out"]]
    found.words += [] if given["approximation_method"] is None else ["--method", method]
    for name, option, value in (
        ("k", "--k", given["k"]),
        ("metric", "--cosine-similarity" if metric == "cosine" else "--no-cosine-similarity", metric),
        ("weights", "--weight-scheme", given["weight_scheme"]),
        ("subword", "--subword-method", given["subword_method"]),
    ):
        if value is None:
            continue
        if name in taken:
            found.words += [f"--{name}", str(value)]
        else:
            found.note(option, f"no effect with {method}")
    found.words += more


def _layershuffle(found: Translation, given: Mapping[str, Any], more: list[str]) -> None:
    from mergekit_ray.operations.shuffle import shuffle

    seed, dtype = given["random_seed"] or 0, "float16" if given["fp16"] else None
    models, weights = given["model"] or [], given["weight"] or []
    recipe = shuffle(models, weights, seed=seed, full_random=bool(given["full_random"]), dtype=dtype).to_yaml()
    words = ["recipe", "shuffle", *(word for model in models for word in ("-m", model))]
    words += [word for weight in weights for word in ("-w", f"{weight:g}")]
    words += ["--seed", str(seed)] if seed else []
    words += ["--full-random"] if given["full_random"] else []
    words += [] if dtype is None else ["--dtype", dtype]
    found.shown = typed(words)
    if given["print_yaml"]:
        found.prints = recipe
    source = "-"
    if given["write_yaml"] is not None:
        source = given["write_yaml"]
        try:
            Path(source).write_text(recipe, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the recipe cannot be written: {error.strerror}", where=source) from None
        found.shown += f" > {shlex.quote(source)}"
    if given["dry_run"]:
        return
    found.words = ["merge", recipe if source == "-" else source, given["out"], *more]
    found.shown += f"{' | ' if source == '-' else ' && '}{typed(['merge', source, given['out'], *more])}"


def _bakllama(found: Translation, given: Mapping[str, Any], more: list[str]) -> None:
    config = given["config"]
    data = read_yaml(_text(config), config).data
    slices = data.get("layer_slices") if isinstance(data, dict) else None
    if not isinstance(slices, list) or not slices:
        raise ConfigError(
            "`layer_slices` is missing", where=config, remedy="list slices, each with `model`, `start` and `end`"
        )
    sources: list[dict[str, Any]] = []
    for i, each in enumerate(slices):
        where = f"{config}: layer_slices[{i}]"
        if not isinstance(each, dict) or not {"model", "start", "end"} <= each.keys():
            raise ConfigError("a slice has `model`, `start` and `end`", where=where)
        source = {"model": each["model"], "layer_range": [each["start"], each["end"]]}
        if each.get("scale") is not None:
            source["parameters"] = {"scale": [{"filter": "down_proj", "value": each["scale"]}, {"value": 1.0}]}
        sources.append(source)
    for key, index, end in (("embedding_source", 0, "first"), ("lm_head_source", -1, "last")):
        if data.get(key) is not None and data[key] != sources[index]["model"]:
            raise ConfigError(
                f"{key} is another model than that of the {end} slice, whose it is here",
                where=config,
                remedy=f"begin or end with a slice of {data[key]}, or leave out {key}",
            )
    recipe: dict[str, Any] = {
        "merge_method": "passthrough",
        "slices": [{"sources": [source]} for source in sources],
        **({"dtype": "float16"} if given["fp16"] else {}),
    }
    _merge_text(found, yaml.safe_dump(recipe, sort_keys=False), given["out"], more)


_TRANSLATED: Final[Mapping[str, Callable[[Translation, Mapping[str, Any], list[str]], None]]] = {
    "multi": _multi,
    "pytorch": _pytorch,
    "extract-lora": _extract_lora,
    "tokensurgeon": _tokensurgeon,
    "layershuffle": _layershuffle,
    "bakllama": _bakllama,
}


def _merge_text(found: Translation, text: str, out: str, more: list[str]) -> None:
    """Merge a recipe that is no file."""
    found.words = ["merge", text, out, *more]
    found.shown = f"{typed(['merge', '-', out, *more])} <<'YAML'\n{text}YAML"


def _text(config: str) -> str:
    """The text of a recipe's file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(config).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"the recipe cannot be read: {reason}", where=config, remedy="check the path") from None
