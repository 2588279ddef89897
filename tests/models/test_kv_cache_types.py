"""A tiny Llama with every type of KV cache against transformers, whose K and V are rounded by numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama import modeling_llama

from forward_helpers import allocate, chunk_batch, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.attention import CacheSpec, choose_attention
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.loading import load_model, plan_model
from lowbit.numerics.cache_format import KvDtype
from oracles import kv_cache as oracle

LAYERS, HEAD = 2, 32
TOKENS = torch.randint(1, 64, (90,), generator=torch.Generator().manual_seed(3)).tolist()
CASES = [
    *(("bf16", "bf16"), ("fp16", "fp16"), ("f32", "f32"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2")),
    *(("int8", "int8"), ("int4", "int4"), ("int8", "int4"), ("int4", "bf16"), ("f32", "int8")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 weights: nothing but the cache rounds. Some channels of K and V are far larger than others."""
    made = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, head_dim=HEAD,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
            if "k_proj" in name or "v_proj" in name:
                parameter.mul_(torch.logspace(-1, 0.3, len(parameter))[torch.randperm(len(parameter)), None])
    model.save_pretrained(made)
    return made


def wanted_logits(folder: Path, k_type: str, v_type: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """transformers, attention over K and V as a cache of these types gives them back."""
    attend = modeling_llama.eager_attention_forward

    def rounded(x: Tensor, kind: str, part: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(oracle.read_back(x.numpy(), kind, part)))

    def spied(module: object, query: Tensor, key: Tensor, value: Tensor, *more: object, **named: object):
        key, value = rounded(key, k_type, "k"), rounded(value, v_type, "v")
        return attend(module, query, key, value, *more, **named)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", spied)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize(("k_type", "v_type"), CASES)
def test_logits(k_type: str, v_type: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = wanted_logits(folder, k_type, v_type, monkeypatch)
    header = open_checkpoint(str(folder))
    model = load_model(header, device="cpu", k_cache_dtype=k_type, v_cache_dtype=v_type)
    [native] = prompt_logits(model, [TOKENS])
    with monkeypatch.context() as patch:
        patch.setattr("lowbit.kernels.attention.attention_kernels", lambda: [ReferenceAttention()])
        [reference] = prompt_logits(model, [TOKENS])
    if "f32" not in (k_type, v_type):
        [exact] = prompt_logits(load_model(header, device="cpu", kv_cache_dtype="f32"), [TOKENS])
        assert (exact - wanted).norm() > 3 * (reference - wanted).norm(), "the type would not be noticed"
    # A last bit of K decides now and then which of two codes it gets: a few logits may differ by a step.
    assert (reference - wanted).norm() <= 2e-3 * wanted.norm()
    assert (native - wanted).norm() <= 5e-2 * wanted.norm(), "bfloat16 queries and weights"


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8_e4m3"])
def test_chunks_do_not_show(kind: str, folder: Path) -> None:
    model = load_model(open_checkpoint(str(folder)), device="cpu", kv_cache_dtype=kind)
    [whole] = prompt_logits(model, [TOKENS])
    caches, pages, found = allocate(model, 7), [3, 0, 6, 2, 5, 1], []
    for first, end in ((0, 1), (1, 18), (18, 19), (19, 64), (64, 90)):
        found.append(model.forward(chunk_batch([(TOKENS[first:end], first, pages)]), caches))
    assert torch.cat(found).equal(whole)


def test_the_plan_counts_scales(folder: Path) -> None:
    header = open_checkpoint(str(folder))
    sizes = {
        kind: plan_model(header, device="cpu", kv_cache_dtype=kind).kv_bytes_per_token
        for kind in ("auto", "bf16", "fp16", "int8", "int4")
    }
    vectors = LAYERS * 2  # of K, and as many of V
    assert sizes["auto"] == vectors * 2 * HEAD * 4, "as exact as a float32 model"
    assert sizes["bf16"] == sizes["fp16"] == vectors * 2 * HEAD * 2
    assert sizes["int8"] == vectors * 2 * (HEAD + 2)
    assert sizes["int4"] == vectors * ((HEAD // 2 + 2 * 4) + (HEAD // 2 + 4))
    mixed = plan_model(header, device="cpu", kv_cache_dtype="bf16", v_cache_dtype="int8")
    assert mixed.kv_bytes_per_token == vectors * (HEAD * 2 + HEAD + 2)
    assert str(mixed.cache_specs[0].dtype) == "bf16 for K, int8 for V"


def test_an_impossible_cache_is_refused_at_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.kernels.attention.attention_kernels", list)
    header = open_checkpoint(str(folder))
    for load in (plan_model, load_model):
        with pytest.raises(
            LowbitError, match="2 heads, k_dim 32, v_dim 32, int8 for K, int4 for V"
        ) as caught:
            load(header, device="cpu", k_cache_dtype="int8", v_cache_dtype="int4")  # type: ignore[operator]
        assert caught.value.code == "E0420"


def test_what_is_no_cache_is_said_once_and_without_other_devices() -> None:
    spec = CacheSpec("recurrent", 2, 32, 32, KvDtype.of("bf16"))
    with pytest.raises(LowbitError) as caught:
        choose_attention(spec, torch.device("cpu"))
    assert caught.value.message.endswith(": serves paged and latent caches, got 'recurrent'")
