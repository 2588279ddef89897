"""The decoder's other families against transformers in float32, on random tiny checkpoints it saved."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import plan_model
from lowbit.models.registry import family_of
from models.family_cases import SIZES, check_logits

GEMMA = {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 48}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.3 * index for index in range(8)],
    "original_max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.2,
}
GLM4_MOE = {
    "head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
DOTS1 = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.08,
    "logits_scaling": 4.0,
    "rms_norm_eps": 0.05,
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
    "Ministral": {
        "head_dim": 32,
        "sliding_window": 30,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    },
    "Gemma": {"head_dim": 32},
    "Gemma with biases, its own head": {
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
    },
    "Gemma2": GEMMA,
    "Gemma3": {**GEMMA, "num_hidden_layers": 7},
    "Gemma2 with biases": GEMMA | {"attention_bias": True, "hidden_activation": "gelu"},
    "Gemma3 scaled, in layers with a window too": GEMMA
    | {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {**YARN, "rope_theta": 100.0, "factor": 2.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
        },
    },
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
    "Qwen3Moe with windows in all layers": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "use_sliding_window": True,
        "sliding_window": 30,
    },
    "Qwen2Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    },
    "Qwen2Moe renormalized, windows": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 30,
        "max_window_layers": 3,
        "qkv_bias": False,
    },
    "Glm": {"head_dim": 32},
    "Glm4": {"head_dim": 32, "attention_bias": False},
    "Glm4Moe": GLM4_MOE | {"attention_bias": True},
    "Glm4Moe in groups, normed heads": GLM4_MOE
    | {"n_group": 4, "topk_group": 2, "use_qk_norm": True, "n_shared_experts": 2, "norm_topk_prob": False},
    "Dots1": DOTS1,
    "Dots1 in groups, windows": DOTS1
    | {
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
        "sliding_window": 30,
        "max_window_layers": 2,
        "head_dim": 32,
    },
    "MiniMaxM2": {
        "head_dim": 32,
        "rotary_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
    },
    "MiniMaxM2 turned whole": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": GRANITE,
    "Granite with biases, tied": GRANITE
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "GraniteMoe": GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 3},
    "GraniteMoeShared": GRANITE
    | {"num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 48},
    "Olmo2": {},
    "Olmo3": {
        "sliding_window": 30,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": YARN,
        },
    },
    "Olmo3 scaled in layers with a window": {
        "sliding_window": 30,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            "full_attention": ROPE,
        },
    },
    "FlexOlmo": {"num_experts": 6, "num_experts_per_tok": 3},
    "FlexOlmo renormalized, biases": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "Olmoe renormalized": {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "StableLm": {},
    "StableLm with biases": {"use_qkv_bias": True, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "StableLm side by side, normed heads": {"use_parallel_residual": True, "qk_layernorm": True},
    "SmolLM3": {},
    "SmolLM3 with windows": {
        "use_sliding_window": True,
        "sliding_window": 30,
        "no_rope_layers": [1, 0, 0, 1],
        "tie_word_embeddings": False,
    },
    "Cohere": {"rope_parameters": ROPE},
    "Cohere normed heads": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.25},
    "Cohere2": {"sliding_window": 30},
    "GptOss": {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 30},
    "GptOss without biases": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": False,
    },
}


def corrections(model: transformers.PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Buffers that are weights."""
    return [(name, buffer) for name, buffer in model.named_buffers() if "correction" in name]


def make_config(case: str) -> transformers.PreTrainedConfig:
    """The tiny config of a case."""
    name = case.split()[0]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    # A copy: transformers writes into what it is given.
    return config_class(**copy.deepcopy(SIZES | CASES.get(case, {})))


def make_checkpoint(case: str, folder: Path) -> transformers.PreTrainedModel:
    """Random weights, norms and biases, saved by transformers."""
    torch.manual_seed(5)
    model = getattr(transformers, f"{case.split()[0]}ForCausalLM")(make_config(case)).eval()
    with torch.no_grad():
        for parameter_name, parameter in [*model.named_parameters(), *corrections(model)]:
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    oracle = make_checkpoint(case, tmp_path)
    # A LongRoPE model uses its long factors at every length; transformers only past the trained one.
    check_logits(tmp_path, oracle, lengths=(150,) if "longrope" in case else (3, 45, 150))


WRONG = [
    ("Granite", {"logits_scaling": 0.0}, "'logits_scaling' must be above 0, found 0"),
    ("Granite", {"residual_multiplier": -0.5}, "a residual multiplier of -0.5"),
    ("Granite", {"attention_multiplier": "much"}, "'attention_multiplier' must be a finite number"),
    ("GraniteMoe", {"num_experts_per_tok": 9}, "each token to 9 of 6 experts"),
    ("Glm4Moe", {"n_group": 3}, "to 3 experts in 1 of 3 groups of 8 experts"),
    ("Glm4Moe", {"n_group": 4}, "to 3 experts in 1 of 4 groups of 8 experts"),
    ("Glm4Moe", {"n_shared_experts": -1}, "'n_shared_experts' must be a whole number"),
    ("Glm4", {"partial_rotary_factor": 2.0, "rope_parameters": None}, "rotary dimension 64 of 32"),
    ("Qwen2Moe", {"mlp_only_layers": 1}, "'mlp_only_layers' must be a list"),
    ("Qwen2Moe", {"shared_expert_intermediate_size": 0}, "'shared_expert_intermediate_size' must be a whole"),
    ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv 8 is not supported"),
    ("SmolLM3", {"no_rope_layers": [1, 1]}, "'no_rope_layers' must be a list of 4 times 0 or 1"),
    ("Cohere", {"logit_scale": 0}, "logits times 0"),
    ("GptOss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5 is not supported; only 1.702 is"),
    ("GptOss", {"swiglu_limit": 5.0}, "swiglu_limit 5 is not supported; only 7 is"),
    ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention true is not supported"),
    ("Gemma3", {"layer_types": ["full_attention"]}, "'layer_types' lists 1 layers and the model has 7"),
    (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 4},
        "a layer of type 'chunked_attention' is not supported",
    ),
    (
        "Olmo3",
        {
            "rope_parameters": {
                "sliding_attention": ROPE,
                "full_attention": ROPE | {"partial_rotary_factor": 0.5},
            }
        },
        "partial_rotary_factor 1 in layers with a window and 0.5 in the others",
    ),
    ("MiniMaxM2", {"use_qk_norm": False}, "use_qk_norm false is not supported"),
    ("MiniMaxM2", {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
    ("MiniMaxM2", {"attn_type_list": [1, 0, 1, 1]}, "attn_type_list has layers of linear attention"),
    ("MiniMaxM2", {"shared_intermediate_size": 64}, "a shared expert is not supported for MiniMax-M2"),
    ("HunYuanMoEV1", {"moe_topk": [1, 1, 2, 1]}, "'moe_topk' differs from layer to layer"),
    ("HunYuanMoEV1", {"use_cla": True}, "use_cla true (layers that share K and V) is not supported"),
    ("Cohere2", {"sliding_window": "wide"}, "'sliding_window' must be a whole number"),
    ("StableLm", {"layer_norm_eps": 0}, "norm epsilon 0"),
    ("StableLm", {"use_parallel_residual": "yes"}, "'use_parallel_residual' must be true or false"),
    ("Cohere", {"architectures": ["GraniteMoeHybridForCausalLM"]}, "most layers are Mamba-2"),
]


@pytest.mark.parametrize(("case", "changes", "message"), WRONG)
def test_configs_that_cannot_be(case: str, changes: dict, message: str, tmp_path: Path) -> None:
    make_config(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": [f"{case.split()[0]}ForCausalLM"]} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(LowbitError, match=re.escape(message)) as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert "\n" not in str(caught.value)


def rewrite(folder: Path, values: dict[str, object], without: tuple[str, ...] = ()) -> None:
    """config.json with other values and without some keys."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))


LEFT_OUT = {
    "Gemma2": ("hidden_activation", "attn_logit_softcapping", "final_logit_softcapping"),
    "Gemma3": ("hidden_activation", "tie_word_embeddings"),
    "Mixtral": ("rope_parameters",),
    "Cohere": ("rope_parameters", "tie_word_embeddings", "logit_scale"),
    "BitNet": ("rope_parameters", "hidden_act"),
    "GptOss": ("rope_parameters", "head_dim"),
    "Qwen3": ("head_dim",),
    "Qwen3Next": ("head_dim",),
    "Glm": ("head_dim",),
    "Glm4": ("head_dim",),
    "Ministral3": ("rope_parameters", "head_dim"),
    "DeepseekV3": ("n_group", "topk_group"),
    "Mistral": ("sliding_window",),
    "Gemma": ("hidden_act", "tie_word_embeddings", "head_dim"),
    "SeedOss": ("attention_bias", "head_dim"),
    "Ernie4_5": ("tie_word_embeddings", "head_dim", "rope_parameters"),
    "MiniMaxM2": ("rope_parameters", "rotary_dim", "head_dim"),
    "Nemotron": ("hidden_act", "rope_parameters"),
    "Dots1": ("norm_topk_prob", "sliding_window", "max_window_layers", "layer_types"),
    "Qwen2 with windows, tied": ("sliding_window",),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_config_leaves_out_is_what_its_class_takes(case: str, tmp_path: Path) -> None:
    make_config(case).save_pretrained(tmp_path)
    rewrite(tmp_path, {"architectures": [f"{case.split()[0]}ForCausalLM"]}, LEFT_OUT[case])
    left_out = transformers.AutoConfig.from_pretrained(tmp_path)
    save_file({"unused": torch.ones(1)}, tmp_path / "model.safetensors")
    header = open_checkpoint(str(tmp_path))
    found = family_of(header).config_of(header)
    left_out.save_pretrained(tmp_path)
    rewrite(tmp_path, {"architectures": [f"{case.split()[0]}ForCausalLM"]})
    header = open_checkpoint(str(tmp_path))
    assert found == family_of(header).config_of(header)


@pytest.mark.parametrize("case", ["Qwen2", "Qwen3"])
def test_dual_chunk_attention_is_served_up_to_its_first_chunk(case: str, tmp_path: Path) -> None:
    """Whose tokens see each other as in any model."""
    make_config(case).save_pretrained(tmp_path)
    save_file({"unused": torch.ones(1)}, tmp_path / "model.safetensors")
    for local, context in ((64, 192), (0, 256), (256, None)):
        chunks = {"chunk_size": 256, "local_size": local, "original_max_position_embeddings": 256}
        told = {"architectures": [f"{case}ForCausalLM"], "dual_chunk_attention_config": chunks}
        rewrite(tmp_path, told)
        header = open_checkpoint(str(tmp_path))
        if context is None:
            with pytest.raises(LowbitError, match="local_size 256 of chunk_size 256"):
                family_of(header).config_of(header)
        else:
            assert family_of(header).config_of(header).context_length == context


def test_a_recipe_added_to_a_newer_config(tmp_path: Path) -> None:
    """rope_scaling beside rope_parameters, as who follows a model card writes it."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = make_config("Qwen3")
    config.rope_parameters = rope
    getattr(transformers, "Qwen3ForCausalLM")(config).save_pretrained(tmp_path)  # noqa: B009
    recipe = {key: value for key, value in YARN.items() if key != "rope_type"} | {"type": "yarn"}
    rewrite(tmp_path, {"rope_scaling": recipe})
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert oracle.config.rope_parameters["rope_type"] == "yarn"
    check_logits(tmp_path, oracle)


WINDOWS = {
    "Mistral": [40] * 4,
    "Mistral without a window": [0] * 4,
    "Qwen2": [0] * 4,
    "Qwen2 with windows, tied": [0, 0, 30, 30],
    "Gemma2": [32, 0, 32, 0],
    "Gemma3": [32, 32, 32, 32, 32, 0, 32],
    "Phi3": [0] * 4,
    "Phi3 with a window": [50] * 4,
    "GptOss": [30, 0, 30, 0],
    "Qwen3Moe with windows in all layers": [30] * 4,
    "Qwen2Moe": [0] * 4,
    "Qwen2Moe renormalized, windows": [30, 0, 30, 0],
    "Olmo2": [0] * 4,
    "Olmo3": [30, 30, 30, 0],
    "SmolLM3": [0] * 4,
    "SmolLM3 with windows": [0, 30, 30, 0],
    "Cohere2": [30, 30, 30, 0],
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_in_the_plan(case: str, tmp_path: Path) -> None:
    make_checkpoint(case, tmp_path)
    windows = [spec.window for spec in plan_model(open_checkpoint(str(tmp_path))).cache_specs]
    assert windows == WINDOWS[case]
