"""DeepSeek V2 and V3 against transformers in float32: latent attention, group routing, YaRN, chunks, "
"extra layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from forward_helpers import allocate, chunk_batch, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "beta_fast": 32,
    "beta_slow": 1,
}
CASES = {
    "DeepseekV2 lite": {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "DeepseekV2": {"q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "DeepseekV3": {"q_lora_rank": 32, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    "DeepseekV3 one group": {"q_lora_rank": 48, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
}


def make_checkpoint(case: str, folder: Path) -> transformers.PreTrainedModel:
    """Random weights, norms and router corrections, saved by transformers."""
    name = case.split()[0]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**SIZES, **CASES[case])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
        for buffer_name, buffer in model.named_buffers():
            if "correction" in buffer_name:
                buffer.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    oracle = make_checkpoint(case, tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(1, 131, (n,), generator=generator).tolist() for n in (3, 45, 150)]
    for prompt, logits in zip(prompts, prompt_logits(model, prompts), strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([prompt])).logits[0]
        worst = ((logits - expected).abs().amax(1) / expected.abs().amax(1)).max()
        assert worst <= 1e-4, f"{case}: {worst:.2e}"


def test_chunks_and_decode(tmp_path: Path) -> None:
    make_checkpoint("DeepseekV3", tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    prompt = torch.randint(1, 131, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    [whole] = prompt_logits(model, [prompt])
    caches, pages, done, parts = allocate(model, 3), [2, 0, 1], 0, []
    for size in (17, 20, 1, 1, 1):
        batch = chunk_batch([(prompt[done : done + size], done, pages)])
        parts.append(model.forward(batch, caches))
        done += size
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4 * float(whole.abs().max()))


def test_cache_holds_the_latent_only(tmp_path: Path) -> None:
    make_checkpoint("DeepseekV3", tmp_path)
    header = open_checkpoint(str(tmp_path))
    plan = plan_model(header)
    [spec] = set(plan.cache_specs)
    assert (spec.kind, spec.k_dim, spec.v_dim) == ("latent", 24 + 8, 24)
    assert plan.kv_bytes_per_token == 3 * 32 * spec.dtype.itemsize
    unpacked = [module for module in plan.modules if module.kernel == "unpacked"]
    assert len(unpacked) == 3 and unpacked[0].stored_nbytes == 4 * (4 * 36) * 24
    caches = allocate(load_model(header, device="cpu"), 5)
    assert sum(buffer.numel() for buffer in caches[0].buffers.values()) == 5 * 16 * 32


def test_prediction_layers_are_left_alone(tmp_path: Path) -> None:
    make_checkpoint("DeepseekV3", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.ones(2, 2)}, file)
    load_model(open_checkpoint(str(tmp_path)), device="cpu")
    save_file({**tensors, "model.layers.1.eh_proj.weight": torch.ones(2, 2)}, file)
    with pytest.raises(LowbitError, match="eh_proj"):
        load_model(open_checkpoint(str(tmp_path)), device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("topk_method", "random", "E0242"),
        ("scoring_func", "tanh", "E0242"),
        ("n_group", 3, "E0216"),
        ("topk_group", 5, "E0216"),
        ("kv_lora_rank", None, "E0216"),
        ("first_k_dense_replace", -1, "E0216"),
        ("num_experts_per_tok", 0, "E0216"),
    ],
)
def test_bad_configs(key: str, value: object, code: str, tmp_path: Path) -> None:
    import json

    make_checkpoint("DeepseekV3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(LowbitError) as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert caught.value.code == code
