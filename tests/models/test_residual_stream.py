"""The residual stream is float32 whatever goes into matrix products: activations of bfloat16, as on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels import native
from lowbit.layers.norm import Norm
from lowbit.loading import load_model
from lowbit.loading.opened import Target
from lowbit.models.language_model import LanguageModel
from lowbit.models.mixer_model import MixerModel
from lowbit.models.model import Model
from models.family_cases import randomized

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},  # norms of heads
    "Olmo2": {},  # no norms before, norms of whole projections
    "Gemma2": {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 48},  # norms before and after
    "Glm4": {"head_dim": 32},  # neighbours turn, a part of a head
    "Cohere": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.25},  # side by side, one norm
    "Granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 4.0},
    "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},  # learned positions
    "GPTNeoX": {"num_key_value_heads": 4},  # side by side, two norms
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    "GptOss": {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 30},
    "DeepseekV2": {
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}


def make_checkpoint(name: str, folder: Path) -> None:
    """Random bfloat16 weights."""
    values = CASES[name] if name == "GPT2" else SIZES | CASES[name]
    config = getattr(transformers, f"{name}Config")(**values | {"vocab_size": 131})
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = randomized(getattr(transformers, f"{name}{head}")(config))
    with torch.no_grad():  # softer attention: a rounding hardly ever turns a head to another token
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 0.6
    model.to(torch.bfloat16).save_pretrained(folder)


def forget_library() -> None:
    """Modules ask for the native library's functions once, and keep them or that there are none."""
    for name, module in list(sys.modules.items()):
        for kept in ("_functions", "functions", "_function", "_native") if name.startswith("lowbit.") else ():
            if hasattr(getattr(module, kept, None), "cache_clear"):
                getattr(module, kept).cache_clear()


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No native library, in this test alone."""
    monkeypatch.setattr(native, "library", lambda: None)
    forget_library()
    yield
    forget_library()


def load(folder: Path) -> Model:
    header = open_checkpoint(str(folder))
    return load_model(header, device="cpu", kv_cache_dtype="f32", linear_kernel="reference")


def watched(module: Any, name: str, seen: list[tuple[torch.dtype, ...]], monkeypatch: Any) -> None:
    """Note the dtypes of what a function of the module is given and gives."""
    function = getattr(module, name)

    def watching(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        tensors = [x for x in (*arguments, result) if isinstance(x, Tensor) and x.is_floating_point()]
        seen.append(tuple(x.dtype for x in tensors))
        return result

    monkeypatch.setattr(module, name, watching)


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_activations_around_a_float32_stream(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(name, tmp_path)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, 131, (n,), generator=generator).tolist() for n in (1, 50)]
    wanted = torch.cat(prompt_logits(load(tmp_path), prompts))

    resolve = Target.resolve
    monkeypatch.setattr(
        Target,
        "resolve",
        lambda *given, **named: replace(resolve(*given, **named), activation_dtype=torch.bfloat16),
    )
    model = load(tmp_path)
    seen: list[tuple[torch.dtype, ...]] = []
    added: list[tuple[torch.dtype, ...]] = []
    assert isinstance(model, LanguageModel)
    assert model.head.in_float32(torch.zeros(1, 64, dtype=torch.bfloat16)).dtype is torch.float32
    watched(type(model), "forward_block", seen, monkeypatch)  # (under the norm, stream, the next)
    if isinstance(model, MixerModel):
        watched(Norm, "of_sum", added, monkeypatch)  # (what a half gave, stream, the next)
    logits = torch.cat(prompt_logits(model, prompts))
    assert len(seen) == len(model.blocks)
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    assert len(added) == (2 * len(model.blocks) if isinstance(model, MixerModel) else 0)
    assert set(added) <= {(x, torch.float32, torch.bfloat16) for x in (torch.bfloat16, torch.float32)}
    assert logits.dtype is torch.float32
    p, q = wanted.log_softmax(1), logits.log_softmax(1)
    divergence = (p.exp() * (p - q)).sum(1).mean()
    assert not logits.equal(wanted), "activations were rounded"
    assert divergence < 1e-3, f"{name}: {divergence:.2e}"
