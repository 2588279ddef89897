"""What a config.json says in each family's own words, by the name its GGUF files have for it.

A family's class, and the keys that only its config has. Families that transformers has no class for become
the class they amount to: InternLM 2, Baichuan 7B and EXAONE 3 are Llama, MiniCPM is Granite.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig
from lowbit.models.config_keys import gguf_keys
from lowbit.models.deepseek import DeepseekConfig

Json = dict[str, object]


def shortest(value: float) -> float:
    """The shortest decimal of a float32: metadata hold 9.99999975e-06 where 1e-05 was written."""
    for digits in range(1, 10):
        found = float(f"{value:.{digits}g}")
        if struct.pack("<f", found) == struct.pack("<f", value):
            return found
    return value


def _class(model_type: str, architecture: str) -> Json:
    return {"architectures": [architecture], "model_type": model_type}


def _moe(config: ModelConfig) -> MoeConfig:
    assert config.moe is not None, "the family has experts"
    return config.moe


def _grouped_experts(config: ModelConfig) -> Json:
    """DeepSeek's keys, which GLM took over."""
    moe = _moe(config)
    return {
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": moe.shared_size // moe.intermediate_size,
        "first_k_dense_replace": config.layers - len(moe.layers),
        "n_group": moe.groups,
        "topk_group": moe.kept_groups,
        "norm_topk_prob": moe.renormalize,
        "routed_scaling_factor": shortest(moe.scale),
        "num_nextn_predict_layers": 0,  # left out
    }


def _unsayable(header: CheckpointHeader, what: str) -> LowbitError:
    return LowbitError("E0450", f"{header.root.name}: {what}; convert the original model instead")


def _one_bias(header: CheckpointHeader, config: ModelConfig, architecture: str) -> None:
    """E0450 unless Q, K, V and the output have a bias or none has: classes with one key for all four."""
    if config.qkv_bias != config.output_bias:
        raise _unsayable(
            header, f"attention has a bias on some projections only, which no config of {architecture} says"
        )


def _llama(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "LlamaForCausalLM")
    return _class("llama", "LlamaForCausalLM") | {"mlp_bias": config.mlp_bias}


def _ministral3(header: CheckpointHeader, config: ModelConfig) -> Json:
    """Mistral Small 3 has no key of Ministral's: it is Mistral without a window."""
    keys, values = gguf_keys(header), _class("mistral", "MistralForCausalLM")
    if keys.has("attention.temperature_scale"):
        values = _class("ministral3", "Ministral3ForCausalLM")
    # The whole context, of which the parsed config may have a part.
    return values | {"max_position_embeddings": keys.size("context_length"), "sliding_window": None}


def _mixtral(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = _moe(config)
    experts: Json = {"num_local_experts": moe.experts, "num_experts_per_tok": moe.per_token}
    return _class("mixtral", "MixtralForCausalLM") | experts


def _qwen2(header: CheckpointHeader, config: ModelConfig) -> Json:
    return _class("qwen2", "Qwen2ForCausalLM")


def _qwen3(header: CheckpointHeader, config: ModelConfig) -> Json:
    return _class("qwen3", "Qwen3ForCausalLM")


def _qwen3_moe(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = _moe(config)
    return _class("qwen3_moe", "Qwen3MoeForCausalLM") | {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _windows(config: ModelConfig) -> Json:
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {"layer_types": kinds, "sliding_window": max(config.windows)}


def _gemma(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "GemmaForCausalLM")
    return _class("gemma", "GemmaForCausalLM")


def _gemma2(header: CheckpointHeader, config: ModelConfig) -> Json:
    scale = config.attention_scale or config.head_dim**-0.5
    values = _class("gemma2", "Gemma2ForCausalLM") | {
        "hidden_activation": config.activation,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }
    return values | _windows(config)


def _gemma3(header: CheckpointHeader, config: ModelConfig) -> Json:
    local = {"rope_local_base_freq": shortest(config.local_rope_theta or 10000.0)}
    return _gemma2(header, config) | _class("gemma3_text", "Gemma3ForCausalLM") | local


def _phi3(header: CheckpointHeader, config: ModelConfig) -> Json:
    values = _class("phi3", "Phi3ForCausalLM")
    values["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.windows:
        values["sliding_window"] = max(config.windows)
    keys = gguf_keys(header)
    values["original_max_position_embeddings"] = keys.size(
        "rope.scaling.original_context_length", config.context_length
    )
    return values


def _qwen2_moe(header: CheckpointHeader, config: ModelConfig) -> Json:
    shared = config.moe.shared_size if config.moe is not None else 0
    own: Json = {"shared_expert_intermediate_size": shared, "qkv_bias": config.qkv_bias}
    return _qwen3_moe(header, config) | _class("qwen2_moe", "Qwen2MoeForCausalLM") | own


def _multipliers(config: ModelConfig) -> Json:
    """Granite's four."""
    return {
        "embedding_multiplier": shortest(config.embedding_scale),
        "residual_multiplier": shortest(config.residual_scale),
        "attention_multiplier": shortest(config.attention_scale or config.head_dim**-0.5),
        "logits_scaling": shortest(1 / config.logit_scale),
    }


def _granite(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "GraniteForCausalLM")
    own: Json = {"mlp_bias": config.mlp_bias}
    return _class("granite", "GraniteForCausalLM") | own | _multipliers(config)


def _granite_moe(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = _moe(config)
    _one_bias(header, config, "GraniteMoeForCausalLM")
    values = _class("granitemoe", "GraniteMoeForCausalLM")
    if moe.shared_size:
        values = _class("granitemoeshared", "GraniteMoeSharedForCausalLM")
        values["shared_intermediate_size"] = moe.shared_size
    values |= {"num_local_experts": moe.experts, "num_experts_per_tok": moe.per_token}
    return values | _multipliers(config)


def _smollm3(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "SmolLM3ForCausalLM")
    return _class("smollm3", "SmolLM3ForCausalLM") | {
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(n not in config.unrotated) for n in range(config.layers)],
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * config.layers,
    }


def _olmo2(header: CheckpointHeader, config: ModelConfig) -> Json:
    """OLMo 3 is ``olmo2`` with windows: its layers that see all tokens are scaled, the others are not."""
    if not config.windows:
        _one_bias(header, config, "Olmo2ForCausalLM")
        return _class("olmo2", "Olmo2ForCausalLM")
    _one_bias(header, config, "Olmo3ForCausalLM")
    local = config.local_rope_theta or config.rope_theta
    plain: Json = {"rope_type": "default", "rope_theta": shortest(local)}
    far = {"rope_type": "default", "rope_theta": shortest(config.rope_theta)}
    values = _class("olmo3", "Olmo3ForCausalLM") | _windows(config)
    return values | {"rope_parameters": {"sliding_attention": plain, "full_attention": far}}


def _olmoe(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = _moe(config)
    _one_bias(header, config, "OlmoeForCausalLM")
    return _class("olmoe", "OlmoeForCausalLM") | {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "norm_topk_prob": moe.renormalize,
        "clip_qkv": None,
    }


def _stablelm(header: CheckpointHeader, config: ModelConfig) -> Json:
    return _class("stablelm", "StableLmForCausalLM") | {
        "layer_norm_eps": shortest(config.norm_eps),
        "use_qkv_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel,
        "qk_layernorm": bool(config.qk_norm),
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
    }


def _cohere(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "CohereForCausalLM")
    return _class("cohere", "CohereForCausalLM") | {
        "layer_norm_eps": shortest(config.norm_eps),
        "logit_scale": shortest(config.logit_scale),
        "use_qk_norm": bool(config.qk_norm),
    }


def _cohere2(header: CheckpointHeader, config: ModelConfig) -> Json:
    if config.qk_norm:
        raise _unsayable(header, "Q and K have norms, which Cohere2ForCausalLM has not")
    return _cohere(header, config) | _class("cohere2", "Cohere2ForCausalLM") | _windows(config)


def _glm(header: CheckpointHeader, config: ModelConfig) -> Json:
    if config.output_bias:
        raise _unsayable(header, "attention's output has a bias, which GLM's classes have not")
    rotated: Json = {"partial_rotary_factor": config.rotary_dim / config.head_dim}
    return _class("glm", "GlmForCausalLM") | rotated


def _glm4(header: CheckpointHeader, config: ModelConfig) -> Json:
    if not config.rotates_neighbours:
        raise _unsayable(header, "the rows of Q and K are halves of heads, as of models that also see")
    return _glm(header, config) | _class("glm4", "Glm4ForCausalLM")


def _glm4_moe(header: CheckpointHeader, config: ModelConfig) -> Json:
    norms: Json = {"use_qk_norm": bool(config.qk_norm)}
    values = _glm(header, config) | _class("glm4_moe", "Glm4MoeForCausalLM") | norms
    return values | _grouped_experts(config)


def _dots1(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "Dots1ForCausalLM")
    values = _class("dots1", "Dots1ForCausalLM") | _grouped_experts(config)
    return values | {"sliding_window": None, "layer_types": ["full_attention"] * config.layers}


def _minimax_m2(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = _moe(config)
    if config.qkv_bias or config.output_bias:
        raise _unsayable(header, "attention has a bias, which MiniMaxM2ForCausalLM has not")
    return _class("minimax_m2", "MiniMaxM2ForCausalLM") | {
        "intermediate_size": moe.intermediate_size,
        "rotary_dim": config.rotary_dim,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
    }


def _seed_oss(header: CheckpointHeader, config: ModelConfig) -> Json:
    own: Json = {"attention_out_bias": config.output_bias, "mlp_bias": config.mlp_bias}
    return _class("seed_oss", "SeedOssForCausalLM") | own


def _ernie(header: CheckpointHeader, config: ModelConfig) -> Json:
    bias: Json = {"use_bias": _all_or_no_bias(header, config, "Ernie4_5ForCausalLM")}
    return _class("ernie4_5", "Ernie4_5ForCausalLM") | bias


def _hunyuan(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "HunYuanDenseV1ForCausalLM")
    return _class("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM")


def _hunyuan_moe(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = _moe(config)
    if {moe.intermediate_size, moe.shared_size} != {config.intermediate_size}:
        raise _unsayable(
            header, "the experts and the shared one are not of one width, as HunYuanMoEV1ForCausalLM has them"
        )
    experts: Json = {"num_experts": moe.experts, "moe_topk": moe.per_token}
    return _hunyuan(header, config) | _class("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM") | experts


def _exaone4(header: CheckpointHeader, config: ModelConfig) -> Json:
    values = _class("exaone4", "Exaone4ForCausalLM")
    if any(config.windows):
        return values | _windows(config)
    whole: Json = {"sliding_window": None, "layer_types": ["full_attention"] * config.layers}
    return values | whole


def _exaone_moe(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe, values = _moe(config), _exaone4(header, config) | _class("exaone_moe", "ExaoneMoeForCausalLM")
    values |= _grouped_experts(config)
    for key in ("n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"):
        del values[key]
    return values | {
        "num_experts": moe.experts,
        "num_shared_experts": moe.shared_size // moe.intermediate_size,
        "mlp_layer_types": ["sparse" if n in moe.layers else "dense" for n in range(config.layers)],
    }


def _starcoder2(header: CheckpointHeader, config: ModelConfig) -> Json:
    return _class("starcoder2", "Starcoder2ForCausalLM") | {
        "norm_epsilon": shortest(config.norm_eps),
        "use_bias": _all_or_no_bias(header, config, "Starcoder2ForCausalLM"),
        "sliding_window": None,
    }


def _all_or_no_bias(header: CheckpointHeader, config: ModelConfig, architecture: str) -> bool:
    """Whether every layer has a bias; E0450 where some have one."""
    biases = {config.qkv_bias, config.output_bias, config.mlp_bias}
    if len(biases) > 1:
        raise _unsayable(
            header, f"some layers have a bias and some have none, which no config of {architecture} says"
        )
    return biases.pop()


def _arcee(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "ArceeForCausalLM")
    return _class("arcee", "ArceeForCausalLM") | {"mlp_bias": config.mlp_bias}


def _nemotron(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "NemotronForCausalLM")
    return _class("nemotron", "NemotronForCausalLM") | {
        "norm_eps": shortest(config.norm_eps),
        "mlp_bias": config.mlp_bias,
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
    }


def _phi(header: CheckpointHeader, config: ModelConfig) -> Json:
    if not _all_or_no_bias(header, config, "PhiForCausalLM") or not config.head_bias:
        raise _unsayable(header, "a layer or the head has no bias, which PhiForCausalLM always has")
    return _class("phi", "PhiForCausalLM") | {
        "layer_norm_eps": shortest(config.norm_eps),
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        "qk_layernorm": False,
    }


def _falcon(header: CheckpointHeader, config: ModelConfig) -> Json:
    two_norms = config.norm_names.mlp != ""
    grouped = two_norms or 1 < config.kv_heads < config.heads
    return _class("falcon", "FalconForCausalLM") | {
        "layer_norm_epsilon": shortest(config.norm_eps),
        "ffn_hidden_size": config.intermediate_size,
        "activation": config.activation,
        "bias": _all_or_no_bias(header, config, "FalconForCausalLM"),
        "alibi": False,
        "parallel_attn": True,
        "multi_query": config.kv_heads == 1,
        "new_decoder_architecture": grouped,
        "num_kv_heads": config.kv_heads,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
    }


def _gpt_neox(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "GPTNeoXForCausalLM")
    return _class("gpt_neox", "GPTNeoXForCausalLM") | {
        "layer_norm_eps": shortest(config.norm_eps),
        "rotary_pct": config.rotary_dim / config.head_dim,
        "rotary_emb_base": shortest(config.rope_theta),
        "use_parallel_residual": config.parallel,
    }


def _gpt2(header: CheckpointHeader, config: ModelConfig) -> Json:
    _all_or_no_bias(header, config, "GPT2LMHeadModel")
    return _class("gpt2", "GPT2LMHeadModel") | {
        "n_embd": config.hidden_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_inner": config.intermediate_size,
        "layer_norm_epsilon": shortest(config.norm_eps),
        "activation_function": config.activation,
    }


def _bitnet(header: CheckpointHeader, config: ModelConfig) -> Json:
    _one_bias(header, config, "BitNetForCausalLM")
    return _class("bitnet", "BitNetForCausalLM")


def _deepseek(header: CheckpointHeader, config: ModelConfig) -> Json:
    """V3's class where experts are chosen by sigmoids, else V2's."""
    moe = _moe(config)
    assert isinstance(config, DeepseekConfig), "the family's"
    sigmoid = moe.routing == "group_sigmoid"
    values = (
        _class("deepseek_v3", "DeepseekV3ForCausalLM")
        if sigmoid
        else _class("deepseek_v2", "DeepseekV2ForCausalLM")
    )
    method = "noaux_tc" if sigmoid else "greedy" if moe.groups == 1 else "group_limited_greedy"
    values |= {
        "num_key_value_heads": config.heads,
        "head_dim": config.rope_dim,
        "q_lora_rank": config.q_lora_rank or None,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.nope_dim,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.v_dim,
        "attention_bias": config.attention_bias,
        "moe_layer_freq": 1,
        "topk_method": method,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
    }
    return values | _grouped_experts(config)


def _gpt_oss(header: CheckpointHeader, config: ModelConfig) -> Json:
    moe = _moe(config)
    values = _class("gpt_oss", "GptOssForCausalLM") | _windows(config)
    values |= {"num_local_experts": moe.experts, "num_experts_per_tok": moe.per_token}
    return values | {"intermediate_size": moe.intermediate_size, "hidden_act": "silu", "swiglu_limit": 7.0}


FAMILIES: dict[str, Callable[[CheckpointHeader, ModelConfig], Json]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "mistral3": _ministral3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "qwen2moe": _qwen2_moe,
    "granite": _granite,
    "granitemoe": _granite_moe,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "stablelm": _stablelm,
    "command-r": _cohere,
    "cohere2": _cohere2,
    "chatglm": _glm,
    "glm4": _glm4,
    "glm4moe": _glm4_moe,
    "exaone4": _exaone4,
    "exaone-moe": _exaone_moe,
    "seed_oss": _seed_oss,
    "ernie4_5": _ernie,
    "hunyuan-dense": _hunyuan,
    "hunyuan-moe": _hunyuan_moe,
    "dots1": _dots1,
    "minimax-m2": _minimax_m2,
    "arcee": _arcee,
    "nemotron": _nemotron,
    "starcoder2": _starcoder2,
    "phi2": _phi,
    "falcon": _falcon,
    "gptneox": _gpt_neox,
    "gpt2": _gpt2,
    "internlm2": _llama,
    "baichuan": _llama,
    "exaone": _llama,
    "minicpm": _granite,
    "deepseek2": _deepseek,
    "bitnet": _bitnet,
    "qwen2vl": _qwen2,
    "qwen3vl": _qwen3,
    "qwen3vlmoe": _qwen3_moe,
    "gpt-oss": _gpt_oss,
}
# Keys of the usual config that a class has others for.
_LAYER_NORM = ("rms_norm_eps",)
WITHOUT = {
    "gpt2": (
        *("rms_norm_eps", "rope_theta", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "hidden_act"),
        "attention_bias",
    ),
    "gptneox": ("rms_norm_eps", "num_key_value_heads", "head_dim", "rope_theta"),
    "falcon": (
        *("rms_norm_eps", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act"),
        "attention_bias",
    ),
    **dict.fromkeys(("command-r", "cohere2", "stablelm", "starcoder2", "phi2", "nemotron"), _LAYER_NORM),
}
