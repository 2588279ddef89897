"""The decoder's other families against transformers in float32, on random tiny checkpoints it saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.loading import load_model, plan_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
GEMMA = {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 48}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.3 * index for index in range(8)],
    "original_max_position_embeddings": 64,
}
CASES = {
    "Mistral": {"head_dim": 32, "sliding_window": 40},
    "Mistral without a window": {"head_dim": 16, "sliding_window": None},
    "Qwen2": {},
    "Qwen2 with windows, tied": {
        "use_sliding_window": True,
        "sliding_window": 30,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "Qwen3": {"head_dim": 32},
    "Gemma2": GEMMA,
    "Gemma3": {**GEMMA, "num_hidden_layers": 7},
    "Phi3": {"sliding_window": None},
    "Phi3 with a window": {"sliding_window": 50},
    "Phi3 longrope": {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    "Phi3 longrope of Phi-4-mini": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            **LONGROPE,
            "short_factor": [1.0] * 6,
            "long_factor": [1.0 + 0.3 * index for index in range(6)],
            "partial_rotary_factor": 0.75,
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "Phi3 partial rotary": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "sliding_window": None,
    },
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "Qwen3Moe with dense layers": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
    },
    "GptOss": {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 30},
}


def make_checkpoint(case: str, folder: Path) -> transformers.PreTrainedModel:
    """Random weights, norms and biases, saved by transformers."""
    name = case.split()[0]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**SIZES, **CASES[case]})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    oracle = make_checkpoint(case, tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    generator = torch.Generator().manual_seed(2)
    # A LongRoPE model uses its long factors at every length; transformers only past the trained one.
    lengths = (150,) if "longrope" in case else (3, 45, 150)
    prompts = [torch.randint(1, 131, (n,), generator=generator).tolist() for n in lengths]
    for prompt, logits in zip(prompts, prompt_logits(model, prompts), strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([prompt])).logits[0]
        worst = ((logits - expected).abs().amax(1) / expected.abs().amax(1)).max()
        assert worst <= 1e-4, f"{case}: {worst:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_windows_are_in_the_plan(case: str, tmp_path: Path) -> None:
    make_checkpoint(case, tmp_path)
    windows = [spec.window for spec in plan_model(open_checkpoint(str(tmp_path))).cache_specs]
    expected = {
        "Mistral": [40] * 4,
        "Qwen2 with windows, tied": [0, 0, 30, 30],
        "Gemma2": [32, 0, 32, 0],
        "Gemma3": [32, 32, 32, 32, 32, 0, 32],
        "Phi3 with a window": [50] * 4,
        "GptOss": [30, 0, 30, 0],
    }
    assert windows == expected.get(case, [0] * 4)
