"""What configs ask for beyond the trained context: how long sequences may be, and the frequencies there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.tiny import CONFIG
from forward_helpers import prompt_logits
from lowbit.checkpoint import CheckpointHeader, open_checkpoint
from lowbit.errors import LowbitError
from lowbit.layers.rotary import rotary_frequencies
from lowbit.loading import load_model
from lowbit.models.config import ModelConfig, base_config
from lowbit.models.config_keys import gguf_keys
from lowbit.models.rope_scaling import scaling_from_gguf, stated_context
from models.family_cases import saved


def config_of(rope: dict[str, Any], architecture: str = "LlamaForCausalLM", **keys: Any) -> ModelConfig:
    """Of a config.json with ``rope_scaling``; 4,096 tokens without more."""
    config = {**CONFIG, "max_position_embeddings": 4096, "architectures": [architecture]}
    config |= {"rope_scaling": rope, **keys}
    return base_config(CheckpointHeader(Path("x"), "safetensors", {}, config))


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
YARNS_OWN = 0.1 * math.log(4.0) + 1
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "keys", "context"),
    [
        (YARN, {}, 16384),  # as Qwen's README adds it
        ({**YARN, "factor": 40.0}, {"max_position_embeddings": 163840}, 163840),  # DeepSeek's, which says all
        (YARN, {"max_position_embeddings": 40960}, 40960),
        ({"type": "yarn", "factor": 4.0}, {"original_max_position_embeddings": 2048}, 8192),
        ({"type": "yarn", "factor": 4.0}, {}, 4096),  # of what, it does not say
        ({"type": "linear", "factor": 4.0}, {}, 16384),  # Vicuna 16k
        ({"rope_type": "linear", "factor": 2.5}, {}, 10240),
        ({"type": "linear", "factor": 8.0}, {"architecture": "Gemma3ForCausalLM"}, 4096),
        ({"type": "dynamic", "factor": 2.0}, {}, 4096),
        ({**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 1024}, {}, 4096),
        ({"rope_type": "default"}, {}, 4096),
    ],
    ids=str,
)
def test_how_long_sequences_may_be(rope: dict[str, Any], keys: dict[str, Any], context: int) -> None:
    config = config_of(rope, **keys)
    assert config.context_length == context
    if "yarn" not in rope.values():  # which has the original context to say it with
        stated = stated_context(config.rope_scaling, context, config.architecture)
        assert stated == 4096, "what another checkpoint written from it says"


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_factors_without_sense(kind: str) -> None:
    with pytest.raises(LowbitError, match="factor 1e.30 makes a context of 4.096e.33 tokens") as caught:
        config_of({**YARN, "type": kind, "factor": 1e30})
    assert caught.value.code == "E0216"


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "llama3"])
@pytest.mark.parametrize("factor", [0, -2.0])
def test_factors_that_stretch_nothing(kind: str, factor: float) -> None:
    with pytest.raises(LowbitError, match="key 'factor' must be above 0, found") as caught:
        config_of({**YARN, **LLAMA3, "type": kind, "rope_type": kind, "factor": factor})
    assert caught.value.code == "E0216"


def test_dynamic_scaling_beyond_the_trained_context(tmp_path: Path) -> None:
    """Of sequences as long as --context-length: transformers' logits. Shorter ones turn as those do, so that
    a token's K does not depend on what follows it."""
    oracle = saved(
        "Llama", tmp_path, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    tokens = torch.arange(40) * 7 % 61
    header = open_checkpoint(str(tmp_path))
    with torch.no_grad():
        short, wanted = (oracle(tokens[None, :count]).logits[0] for count in (16, 40))
    longer = load_model(header, device="cpu", dtype="float32", context_length=40)
    found = prompt_logits(longer, [tokens.tolist()])[0]
    assert longer.context_length == 40 and (found - wanted).abs().max() < 1e-4
    assert (prompt_logits(longer, [tokens[:16].tolist()])[0] - found[:16]).abs().max() < 1e-4
    own = load_model(header, device="cpu", dtype="float32")
    assert own.context_length == 16
    assert (prompt_logits(own, [tokens[:16].tolist()])[0] - short).abs().max() < 1e-4
    assert (short - wanted[:16]).abs().max() > 1e-2, "they differ"


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_longrope_by_its_names_of_2024(name: str) -> None:
    """Quantized copies of Phi-3-128k of that spring still have them."""
    half = 64 // 2 // 2
    rope = {"long_factor": [4.0] * half, "short_factor": [1.5] * half}
    keys = {"original_max_position_embeddings": 1024}
    wanted = config_of({"rope_type": "longrope", **rope}, **keys)
    assert wanted.rope_scaling.divisors == (4.0,) * half
    assert config_of({"type": name, **rope}, **keys) == wanted


@pytest.mark.parametrize(
    ("more", "magnitude"),
    [
        ({}, YARNS_OWN),
        ({"attn_factor": 1.0}, YARNS_OWN),  # as llama.cpp writes whatever it saves
        ({"attn_factor": 0.5}, 0.5 * YARNS_OWN),
        ({"attn_factor": 0.0}, YARNS_OWN),
        ({"yarn_attn_factor": 1.25, "attn_factor": 1.25 / YARNS_OWN}, 1.25),
    ],
    ids=str,
)
def test_magnitudes_of_yarn_in_gguf_files(more: dict[str, float], magnitude: float) -> None:
    """ggml multiplies YaRN's own by attn_factor."""
    rope = {"type": "yarn", "factor": 4.0, "original_context_length": 64, **more}
    values: dict[str, object] = {f"llama.rope.scaling.{key}": value for key, value in rope.items()}
    header = CheckpointHeader(
        Path("x.gguf"), "gguf", {}, metadata={"general.architecture": "llama", **values}
    )
    scaling = scaling_from_gguf(gguf_keys(header), header)
    assert rotary_frequencies(32, 10000.0, scaling)[1] == pytest.approx(magnitude)
