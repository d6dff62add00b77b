"""Hidden states of a whole model, without the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mergekit_ray.checkpoint.opening import open_checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.routing.batches import make_batches
from mergekit_ray.routing.layers import prompt_states
from mergekit_ray.routing.prompts import tokenize
from support.models import FAMILIES, SHAPE, ModelLibrary, load, save_tokenizer
from support.references.routing import (
    LONG,
    NUM_LAYERS,
    TOKENS,
    WatchedSource,
    assert_same_states,
    opened,
    recipe_of,
    route,
    streamed_states,
    unit,
    whole_model_states,
)


class TestStates:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("average", [False, True])
    def test_those_of_the_whole_model(self, family: str, average: bool, library: ModelLibrary) -> None:
        folder = library.get(family)
        batches = make_batches(TOKENS, max_tokens=24)
        assert len(batches) > 2
        assert any(len(set(batch.lengths)) > 1 for batch in batches)  # padding
        expected = whole_model_states(load(folder), TOKENS, average=average)
        assert_same_states(streamed_states(opened(folder), batches, average=average), expected)

    @pytest.mark.parametrize(
        "config",
        [
            transformers.Olmo2Config(**SHAPE, num_hidden_layers=3, vocab_size=128),
            transformers.StableLmConfig(**SHAPE, num_hidden_layers=3, vocab_size=128),
            transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=128),
            transformers.GPTJConfig(n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=8, vocab_size=128),
            transformers.OPTConfig(
                hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
                vocab_size=128, max_position_embeddings=64,
            ),
            transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=128),
            transformers.Gemma3TextConfig(
                **SHAPE, head_dim=8, num_hidden_layers=6, vocab_size=128, sliding_window=8, query_pre_attn_scalar=8
            ),
        ],
        ids=lambda config: config.model_type,
    )  # fmt: skip
    def test_other_families(self, config: Any, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        model.save_pretrained(tmp_path / "model")
        expected = whole_model_states(model, TOKENS, average=False)
        batches = make_batches(TOKENS, max_tokens=64)
        assert_same_states(streamed_states(opened(tmp_path / "model"), batches, average=False), expected)

    def test_bfloat16_weights_are_computed_with_in_float32(self, library: ModelLibrary) -> None:
        folder = library.get("llama", dtype=torch.bfloat16)
        expected = whole_model_states(load(folder).float(), TOKENS, average=False)
        assert_same_states(streamed_states(opened(folder), make_batches(TOKENS), average=False), expected)

    def test_a_checkpoint_without_the_prefix_of_its_head(self, library: ModelLibrary, tmp_path: Path) -> None:
        model = load(library.get("gpt_neox"))
        model.gpt_neox.save_pretrained(tmp_path / "bare")
        assert "layers.0.mlp.dense_h_to_4h.weight" in opened(tmp_path / "bare").tensors
        expected = whole_model_states(model, TOKENS, average=False)
        states = streamed_states(opened(tmp_path / "bare"), make_batches(TOKENS), average=False)
        assert_same_states(states, expected)

    def test_rotary_embeddings_that_scale_with_the_length(self, tmp_path: Path) -> None:
        shape = {**SHAPE, "max_position_embeddings": 6}
        scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        config = transformers.LlamaConfig(**shape, num_hidden_layers=3, vocab_size=128, rope_scaling=scaling)
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        checkpoint = opened(tmp_path / "model")
        # A model keeps its longest embeddings so far, so each prompt gets a new one.
        expected = [whole_model_states(load(tmp_path / "model"), [prompt], average=False) for prompt in TOKENS]
        batches = make_batches(TOKENS, equal_lengths=True)
        assert_same_states(streamed_states(checkpoint, batches, average=False), np.concatenate(expected, 1))

        save_tokenizer(tmp_path / "model")
        prompts = ["the capital", LONG]
        tokens = tokenize(opened(tmp_path / "model"), prompts)
        found = route(recipe_of(tmp_path / "model", [([prompt], []) for prompt in prompts])).vectors
        for expert, prompt in enumerate(tokens):
            alone = whole_model_states(load(tmp_path / "model"), [prompt], average=False)
            for layer, rows in found.items():
                np.testing.assert_allclose(rows[expert], unit(alone[layer, 0]), rtol=0, atol=5e-6)

    @pytest.mark.parametrize("changed", [False, True])
    def test_layers_that_return_tuples(
        self, changed: bool, library: ModelLibrary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in older versions of transformers; and a model that changes the state between layers."""
        from transformers.models.llama import modeling_llama

        folder = library.get()
        expected = whole_model_states(load(folder), TOKENS, average=False)
        computed = modeling_llama.LlamaDecoderLayer.forward

        def forward(self: Any, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            hidden = self.embed_tokens(input_ids)
            positions = torch.arange(hidden.shape[1])[None]
            rotary = self.rotary_emb(hidden, positions)
            for layer in self.layers:
                hidden = layer(hidden_states=hidden, position_embeddings=rotary)[0]
                hidden = hidden * 2 if changed else hidden
            return hidden

        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", lambda *a, **k: (computed(*a, **k), None))
        batches = make_batches(TOKENS)
        if changed:
            with pytest.raises(ModelError, match="LlamaModel does more than hand a state from each decoder layer"):
                prompt_states(opened(folder), batches, average=False)
        else:
            assert_same_states(streamed_states(opened(folder), batches, average=False), expected)


class TestReading:
    def test_layers_once_each_and_of_the_embeddings_the_rows_of_the_prompts(self, library: ModelLibrary) -> None:
        source = WatchedSource(library.get(tied=False))
        checkpoint = open_checkpoint(source, "model")
        source.reads.clear()
        batches = make_batches(TOKENS, max_tokens=8)
        prompt_states(checkpoint, batches, average=False)

        def ranges(prefix: str) -> set[tuple[int, int]]:
            found = [location for name, (_, location) in checkpoint.tensors.items() if name.startswith(prefix)]
            return {(location.start, location.end) for location in found}

        rows = checkpoint.tensors["model.embed_tokens.weight"][1]
        used = sorted({token for prompt in TOKENS for token in prompt})
        row_bytes = 4 * SHAPE["hidden_size"]
        assert [set(read) for read in source.reads] == [
            ranges("model.norm."),
            {(rows.start + token * row_bytes, rows.start + (token + 1) * row_bytes) for token in used},
            *(ranges(f"model.layers.{layer}.") for layer in range(NUM_LAYERS - 1)),
        ]
        assert source.whole == ["config.json"]

    def test_no_weight_of_the_skeleton_takes_memory(self, library: ModelLibrary) -> None:
        from mergekit_ray.routing.skeleton import build_skeleton

        skeleton = build_skeleton(opened(library.get("gemma2")))
        assert all(parameter.is_meta for parameter in skeleton.base.parameters())
        assert not any(buffer.is_meta for buffer in skeleton.base.buffers())
        assert not torch.nn.Linear(2, 2).weight.is_meta  # modules made afterwards are as ever

    def test_of_the_tokenizer_only_its_own_files(self, llama: Path) -> None:
        (llama / "modeling_other.py").write_text("raise SystemExit('remote code was run')")
        (llama / "README.md").write_text("a card")
        source = WatchedSource(llama)
        assert tokenize(open_checkpoint(source, "model"), ["the capital"]) == [(1, 4, 5)]
        assert set(source.whole) <= {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        assert "tokenizer.json" in source.whole


class TestTokens:
    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_begin_with_bos_once(self, adds_bos: bool, llama: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.processors import TemplateProcessing

        if adds_bos:
            tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
            special = [("<s>", 1), ("</s>", 2)]
            tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
            tokenizer.save(str(llama / "tokenizer.json"))
        found = tokenize(opened(llama), ["the capital", "<s>the capital", "nowhere"])
        assert found == [(1, 4, 5), (1, 4, 5), (1, 3)]

    def test_without_a_bos(self, llama: Path) -> None:
        file = llama / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None}))
        assert tokenize(opened(llama), ["the capital"]) == [(4, 5)]
        assert tokenize(opened(llama), ["the capital", "  "])[1] == ()

    def test_batches_hold_every_prompt_once(self) -> None:
        batches = make_batches(TOKENS, max_tokens=12)
        assert sorted(index for batch in batches for index in batch.indices) == list(range(len(TOKENS)))
        for batch in batches:
            assert batch.tokens == tuple(TOKENS[index] for index in batch.indices)
            assert len(batch.tokens) == 1 or len(batch.tokens) * max(batch.lengths) <= 12
        assert [batch.lengths for batch in batches] == [[2, 3, 4], [4], [12], [21]]

    def test_batches_of_equal_lengths(self) -> None:
        batches = make_batches(TOKENS, equal_lengths=True)
        assert [batch.lengths for batch in batches] == [[2], [3], [4, 4], [12], [21]]
