"""Files of strangers that are sound but for one value: all that may come of them is a result or one of our errors.

    python -m support.failures.hostile_values TARGET FOLDER

plans (or verifies, reproduces, attests) with every value of a file replaced, one at a time, by extreme ones, within
`ROOM_BYTES` of memory beyond what a sound file takes. Prints what is wrong, a line each, and how many it tried.
"""

from __future__ import annotations

import copy
import itertools
import json
import resource
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.operations.attest import statement
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import verify
from mergekit_ray.output.destination import MANIFEST_FILE
from mergekit_ray.output.manifest import read_manifest
from mergekit_ray.storage import open_source
from support.memory_inputs import write_model

ROOM_BYTES: Final = 256 << 20
LOCAL: Final = MergeOptions(executor="local", num_workers=1)
DELETED: Final = object()

EXTREMES: Final[tuple[Any, ...]] = (
    *(DELETED, None, True, False, -1, 0, 1, 3, 2**31, 10**9, 10**12, -(10**12), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *("", "x", "7", "\ud800", "é\0\n", "a" * 300, "../x", "/etc/passwd", "a/b", "(" * 50, "((a+)+)+$"),
    *(
        [],
        [1, 2],
        ["x"],
        [None],
        [[]],
        [10**12, 10**12],
        list(range(5000)),
        {},
        {"x": 1},
        {"\ud800": "\ud800"},
        {"": {}},
    ),
)


def changed(content: Any) -> Iterator[tuple[str, Any]]:
    """Copies of plain data in which one value is another or gone, with where and what."""
    for path in _paths(content):
        for value in EXTREMES:
            found = copy.deepcopy(content)
            owner = found
            for step in path[:-1]:
                owner = owner[step]
            if value is not DELETED:
                owner[path[-1]] = value
            else:
                del owner[path[-1]]
            yield f"{path} = {'deleted' if value is DELETED else repr(value)[:60]}", found


def _paths(content: Any) -> Iterator[tuple[Any, ...]]:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, dict):
        children = itertools.islice(content.items(), 40)
    elif isinstance(content, list):  # what is listed is alike
        children = itertools.islice(enumerate(content), 2)
    for key, value in children:
        yield (key,)
        yield from ((key, *rest) for rest in _paths(value))


def weights(num_layers: int = 2, *, seed: int = 0, experts: int = 0, fp8: bool = False) -> dict[str, torch.Tensor]:
    """Of a small Llama, a Mixtral with so many experts, or a Llama in 8-bit floats with scales per block."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": make(16, 8), "model.norm.weight": make(8), "lm_head.weight": make(16, 8)}
    for i in range(num_layers):
        layer = {f"self_attn.{part}_proj.weight": make(8, 8) for part in "qkvo"}
        layer |= {"input_layernorm.weight": make(8), "post_attention_layernorm.weight": make(8)}
        if experts:
            layer["block_sparse_moe.gate.weight"] = make(experts, 8)
            for k in range(experts):
                sizes = {"w1": (12, 8), "w2": (8, 12), "w3": (12, 8)}
                layer |= {f"block_sparse_moe.experts.{k}.{w}.weight": make(*size) for w, size in sizes.items()}
        else:
            layer |= {"mlp.gate_proj.weight": make(12, 8), "mlp.up_proj.weight": make(12, 8)}
            layer["mlp.down_proj.weight"] = make(8, 12)
        if fp8:
            codes = {name: tensor for name, tensor in layer.items() if tensor.dim() == 2}
            layer |= {name: tensor.to(torch.float8_e4m3fn) for name, tensor in codes.items()}
            layer |= {
                f"{name}_scale_inv": torch.ones(-(-t.shape[0] // 4), -(-t.shape[1] // 4)) for name, t in codes.items()
            }
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def config(kind: str = "llama", **more: Any) -> dict[str, Any]:
    """A config that says all that is ever read of one."""
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "vocab_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.0,
        "sliding_window": 32,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "first_k_dense_replace": 0,
        "layer_types": ["full_attention", "sliding_attention"],
        "auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"},
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "mlp_only_layers": [0],
        "no_rope_layers": [1, 1],
        **more,
    }


@dataclass(frozen=True)
class Target:
    """What is done with the changed files.

    Attributes:
        file: that is changed.
        run: what is done then.
    """

    file: Path
    run: Callable[[], object]


def _model(folder: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> Path:
    return folder if folder.exists() else write_model(folder, tensors, content)


def _planned(file: Path, *recipes: Mapping[str, Any]) -> Target:
    def run() -> None:
        errors = []
        for recipe in recipes:
            try:
                mergekit_ray.plan(recipe, options=MergeOptions(allow_config_conflicts=True))  # else it ends most
            except MergekitRayError as error:
                errors.append(error)
        for error in errors:
            raise error

    return Target(file, run)


def _dense(folder: Path) -> Target:
    base = _model(folder / "base", weights(), config())
    other = _model(folder / "other", weights(seed=1), config())
    tuned = [{"model": str(other), "parameters": {"weight": 0.5}}]
    cut = [{"sources": [{"model": str(base), "layer_range": [i, i + 1]}]} for i in (1, 0)]
    return _planned(
        base / "config.json",
        {"merge_method": "task_arithmetic", "base_model": str(base), "models": tuned},
        {"merge_method": "linear", "models": [*tuned, {"model": str(base), "parameters": {"weight": 0.5}}]},
        {"merge_method": "passthrough", "slices": cut},
    )


def _nested(folder: Path) -> Target:
    inner = config()
    base = _model(
        folder / "base", weights(), {"model_type": "llava", "text_config": inner, "vision_config": {"depth": 2}}
    )
    return _planned(base / "config.json", {"merge_method": "passthrough", "models": [{"model": str(base)}]})


def _quantised(folder: Path) -> Target:
    said = {"quant_method": "fp8", "weight_block_size": [4, 4], "expert_dtype": "x", "load_in_4bit": False}
    base = _model(folder / "base", weights(fp8=True), config(quantization_config=said))
    return _planned(base / "config.json", {"merge_method": "passthrough", "models": [{"model": str(base)}]})


def _compressed(folder: Path) -> Target:
    group = {"weights": {"type": "float", "num_bits": 8, "block_structure": [4, 4], "group_size": 4, "symmetric": True}}
    said = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": group},
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
    }
    base = _model(folder / "base", weights(fp8=True), config(quantization_config=said))
    return _planned(base / "config.json", {"merge_method": "passthrough", "models": [{"model": str(base)}]})


def _experts(folder: Path) -> Target:
    base = _model(folder / "base", weights(), config())
    other = _model(folder / "other", weights(seed=1), config())
    experts = [{"source_model": str(model)} for model in (base, other)]
    made = {"base_model": str(base), "gate_mode": "random", "experts": experts}
    return _planned(
        base / "config.json", *({**made, "architecture": kind} for kind in ("mixtral", "qwen2_moe", "custom"))
    )


def _growth(folder: Path) -> Target:
    said = config("mixtral", num_local_experts=2, num_experts_per_tok=2)
    base = _model(folder / "base", weights(experts=2), said)
    other = _model(folder / "other", weights(seed=1), config("mistral"))
    experts = [{"source_model": str(other)}]
    made = {"base_model": str(base), "add_to_base": True, "gate_mode": "random", "experts": experts}
    return _planned(base / "config.json", made)


def _adapter(folder: Path) -> Target:
    base = _model(folder / "base", weights(), config())
    name = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(12, 4)}
    adapter = _model(folder / "adapter", factors, {})
    said = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"down_proj": 4},
        "bias": "none",
        "alpha_pattern": {"down_proj": 4},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "use_dora": False,
        "modules_to_save": ["lm_head"],
        "target_modules": ["up_proj"],
        "layers_pattern": "layers",
        "layers_to_transform": [0],
        "exclude_modules": ["x"],
        "init_lora_weights": True,
        "target_parameters": [],
        "ensure_weight_tying": False,
        "lora_bias": False,
        "layer_replication": [],
        "lora_dropout": 0.0,
        "base_model_name_or_path": "x",
        "task_type": "CAUSAL_LM",
        "megatron_config": {},
        "corda_config": {},
    }
    if (adapter / "model.safetensors").exists():
        (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
        (adapter / "config.json").unlink()
        (adapter / "adapter_config.json").write_text(json.dumps(said))
    return _planned(
        adapter / "adapter_config.json", {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    )


def _index(folder: Path) -> Target:
    base = _model(folder / "base", weights(), config())
    file = base / "model.safetensors.index.json"
    if not file.exists():
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(weights(), "model-00001-of-00001.safetensors")
        file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return _planned(file, {"merge_method": "passthrough", "models": [{"model": str(base)}]})


def _published(folder: Path) -> Path:
    base = _model(folder / "base", weights(), config())
    if not (folder / "out").exists():
        recipe = {"merge_method": "passthrough", "models": [{"model": str(base)}], "output": {"max_shard_size": 500}}
        mergekit_ray.merge(recipe, folder / "out", options=LOCAL)
    return folder / "out"


def _verify(name: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        out = _published(folder)
        return Target(out / name, lambda: verify(open_source(str(out))))

    return make


def _attest(folder: Path) -> Target:
    out = _published(folder)
    return Target(out / MANIFEST_FILE, lambda: statement(open_source(str(out)), "model"))


def _reproduce(folder: Path) -> Target:
    out = _published(folder)
    numbers = itertools.count()
    return Target(
        out / MANIFEST_FILE,
        lambda: reproduce(read_manifest(str(out)), str(folder / f"again-{next(numbers)}"), LOCAL),
    )


TARGETS: Final[Mapping[str, Callable[[Path], Target]]] = {
    "dense": _dense,
    "nested": _nested,
    "quantised": _quantised,
    "compressed": _compressed,
    "experts": _experts,
    "growth": _growth,
    "adapter": _adapter,
    "index": _index,
    "verified config": _verify("config.json"),
    "verified index": _verify("model.safetensors.index.json"),
    "verified manifest": _verify(MANIFEST_FILE),
    "attested manifest": _attest,
    "reproduced manifest": _reproduce,
}


def main(name: str, folder: Path) -> None:
    """Run one target."""
    target = TARGETS[name](folder)
    sound = target.file.read_text()
    target.run()
    _limit_memory()
    number = 0
    for what, content in changed(json.loads(sound)):
        number += 1
        target.file.write_text(json.dumps(content))
        if fault := _fault(target.run):
            sys.stdout.write(f"{what}: {fault}\n")
    target.file.write_text(sound)
    sys.stdout.write(f"tried {number}\n")


def _fault(run: Callable[[], object]) -> str | None:
    """What is wrong with how it ends, None if it is a result or an error for users."""
    try:
        run()
    except MergekitRayError as error:
        return None if error.exit_code in (2, 3) else f"exit code {error.exit_code}: {error}"
    except BaseException as error:  # noqa: BLE001 - a fault of any kind is what is looked for
        return "".join(traceback.format_exception(error)[-2:])
    return None


def _limit_memory() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
