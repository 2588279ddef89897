"""The metadata of a GGUF file for a model: the keys llama.cpp's converter writes, from the parsed config.

The other way round than ``config`` and ``families`` read them. ``lost`` says what a family's GGUF files have
no key for.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.layers.rotary import RopeScaling, rotary_frequencies
from lowbit.models.config import ModelConfig, MoeConfig
from lowbit.models.config_keys import architecture_of, json_keys
from lowbit.models.deepseek import DeepseekConfig
from lowbit.models.families.vision import text_header
from lowbit.models.rope_scaling import rope_keys

# Family -> general.architecture. All of Llama's relatives are "llama"; OLMo 3 is OLMo 2 with windows.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "ministral3": "mistral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "qwen2_moe": "qwen2moe",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmoe": "olmoe",
    "stablelm": "stablelm",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "glm": "chatglm",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "internlm": "llama",
    "internlm2": "internlm2",
    "baichuan": "baichuan",
    "minicpm": "minicpm",
    "exaone": "exaone",
    "exaone4": "exaone4",
    "exaone_moe": "exaone-moe",
    "seed_oss": "seed_oss",
    "ernie4_5": "ernie4_5",
    "hunyuan_dense": "hunyuan-dense",
    "hunyuan_moe": "hunyuan-moe",
    "dots1": "dots1",
    "minimax_m2": "minimax-m2",
    "arcee": "arcee",
    "nemotron": "nemotron",
    "starcoder2": "starcoder2",
    "phi": "phi2",
    "falcon": "falcon",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
    "gpt_oss": "gpt-oss",
    "deepseek": "deepseek2",
    "bitnet": "bitnet",
}
# Language models that have an architecture of their own where they see pictures: class -> architecture.
SEEING = {
    "Mistral3ForConditionalGeneration": "mistral3",
    "Qwen2VLForConditionalGeneration": "qwen2vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2vl",
    "Qwen3VLForConditionalGeneration": "qwen3vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3vlmoe",
}
# Families whose windows have a key, and those whose files also list the layers that have one.
_WINDOWED = ("gemma2", "gemma3", "phi3", "cohere2", "olmo3", "exaone4", "exaone_moe", "gpt_oss")
_PATTERNED = ("olmo3", "exaone4", "exaone_moe")
# Windows that GGUF files of the family have no key for: left out, and told.
UNSAID_WINDOWS = ("mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2", "smollm3")
# Architectures that llama.cpp loads with a head of their own only: a tied one is written twice.
WITH_OWN_HEAD = frozenset(
    {
        *("baichuan", "gptneox", "internlm2", "olmo2", "olmoe", "gpt-oss", "phi2", "qwen2moe", "stablelm"),
    }
)
# Families whose norms GGUF holds with 1 added.
SHIFTED_NORMS = ("gemma", "gemma2", "gemma3", "nemotron")


def architecture_for(family: str, header: CheckpointHeader) -> str:
    """``general.architecture``, or E0450."""
    if family not in ARCHITECTURES:
        raise LowbitError(
            "E0450",
            f"{header.root.name}: GGUF files of {printable(family)} are not written: those of "
            f"{', '.join(sorted(ARCHITECTURES))} are. Use llama.cpp's convert_hf_to_gguf.py",
        )
    return SEEING.get(architecture_of(header), ARCHITECTURES[family])


def gguf_metadata(header: CheckpointHeader, family: str, config: ModelConfig) -> dict[str, object]:
    """The keys below the architecture's prefix, complete with it."""
    arch = architecture_for(family, header)
    values: dict[str, object] = {
        "block_count": config.layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    # Both where llama.cpp's converter and what reads its files do not agree on one.
    if config.layer_norm or family == "exaone":
        values["attention.layer_norm_epsilon"] = config.norm_eps
    if not config.layer_norm or family in ("cohere", "cohere2", "nemotron"):
        values["attention.layer_norm_rms_epsilon"] = config.norm_eps
    if not config.learned_positions:
        values |= {"rope.freq_base": config.rope_theta, "rope.dimension_count": config.rotary_dim}
    if config.moe is not None:
        values |= _experts(family, config, config.moe)
    values |= _of_family(family, config)
    if config.attention_softcap:
        values["attn_logit_softcapping"] = config.attention_softcap
    if config.logit_softcap:
        values["final_logit_softcapping"] = config.logit_softcap
    if family in _WINDOWED and any(config.windows):
        values["attention.sliding_window"] = max(config.windows)
        if family in _PATTERNED:
            values["attention.sliding_window_pattern"] = [bool(window) for window in config.windows]
    if config.local_rope_theta is not None:
        values["rope.freq_base_swa"] = config.local_rope_theta
    if family == "phi3":
        trained = json_keys(header).size("original_max_position_embeddings", config.context_length)
        values["rope.scaling.original_context_length"] = trained
    values |= _rope(header, config)
    if arch in SEEING.values():
        values |= _seeing(header)
    if family == "ministral3":
        values |= _growing_queries(header)
    return {f"{arch}.{key}": value for key, value in values.items()}


def _experts(family: str, config: ModelConfig, moe: MoeConfig) -> dict[str, object]:
    values: dict[str, object] = {"expert_count": moe.experts, "expert_used_count": moe.per_token}
    if family not in ("mixtral", "granitemoe", "olmoe"):
        values["expert_feed_forward_length"] = moe.intermediate_size
    if family in ("qwen2_moe", "granitemoe", "hunyuan_moe", "exaone_moe") and moe.shared_size:
        values["expert_shared_feed_forward_length"] = moe.shared_size
    if family == "hunyuan_moe":
        values["expert_shared_count"] = moe.shared_size // config.intermediate_size
    if moe.routing == "group_sigmoid":
        values["expert_gating_func"] = 2
    if family in ("glm4_moe", "deepseek", "dots1", "exaone_moe"):
        values |= {
            "expert_shared_count": moe.shared_size // moe.intermediate_size,
            "leading_dense_block_count": config.layers - len(moe.layers),
            "expert_group_count": moe.groups,
            "expert_group_used_count": moe.kept_groups,
            "expert_gating_func": 2 if moe.routing == "group_sigmoid" else 1,  # sigmoid, softmax
            "expert_weights_scale": moe.scale,
            "expert_weights_norm": moe.renormalize,
            "nextn_predict_layers": 0,  # left out
        }
    return values


def _of_family(family: str, config: ModelConfig) -> dict[str, object]:
    """Keys that one family has, or few."""
    match family:
        case "deepseek":
            return _latent(config)
        case "granite" | "granitemoe" | "minicpm":
            values: dict[str, object] = {
                "embedding_scale": config.embedding_scale,
                "residual_scale": config.residual_scale,
                "logit_scale": 1 / config.logit_scale,  # a divisor
            }
            if config.attention_scale is not None:
                values["attention.scale"] = config.attention_scale
            if family == "granite" and len(config.unrotated) == config.layers:
                values["rope.scaling.finetuned"] = False  # turns all rotation off
            return values
        case "cohere" | "cohere2":
            return {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}
        case "nemotron" | "exaone_moe" if config.rope_scaling.kind == "none":
            return {"rope.scaling.type": "none"}
        case "stablelm" | "gpt_neox":
            return {"use_parallel_residual": config.parallel}
        case "falcon":
            return {"tensor_data_layout": "jploski"}
        case "bitnet":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
        case "baichuan":
            return {"tensor_data_layout": "Meta AI original pth"}
    return {}


def _seeing(header: CheckpointHeader) -> dict[str, object]:
    """How positions are divided, and how many layers take pictures in; the pictures' part is another file."""
    holders = (header.config.get("text_config"), header.config)
    sections = (
        holder[key].get("mrope_section")
        for holder in holders
        if isinstance(holder, dict)
        for key in ("rope_parameters", "rope_scaling")
        if isinstance(holder.get(key), dict)
    )
    section = next((found for found in sections if isinstance(found, list)), None)
    values: dict[str, object] = {}
    if section is not None:
        values["rope.dimension_sections"] = [*map(int, section), 0, 0, 0, 0][:4]
    vision = header.config.get("vision_config")
    deep = vision.get("deepstack_visual_indexes") if isinstance(vision, dict) else None
    return values | ({"n_deepstack_layers": len(deep)} if isinstance(deep, list) else {})


def _growing_queries(header: CheckpointHeader) -> dict[str, object]:
    """Of Ministral 3: what its queries grow by, and the whole context; the parsed config has a part of it."""
    keys = json_keys(text_header(header) if "text_config" in header.config else header)
    rope = rope_keys(keys)
    values: dict[str, object] = {"context_length": keys.size("max_position_embeddings")}
    if rope.has("llama_4_scaling_beta"):
        values["attention.temperature_scale"] = rope.number("llama_4_scaling_beta")
    if rope.number("mscale_all_dim", 0.0):
        values["rope.scaling.yarn_log_multiplier"] = rope.number("mscale_all_dim")
    return values


def _latent(config: ModelConfig) -> dict[str, object]:
    """Of the absorbed form, in which heads share one latent row; ``mla`` is of the heads themselves."""
    assert isinstance(config, DeepseekConfig), "the family's"
    values: dict[str, object] = {
        "attention.key_length": config.kv_lora_rank + config.rope_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.head_dim,
        "attention.value_length_mla": config.v_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
    }
    if config.q_lora_rank:
        values["attention.q_lora_rank"] = config.q_lora_rank
    mscale = config.rope_scaling.mscale_all_dim
    return values | ({"rope.scaling.yarn_log_multiplier": 0.1 * mscale} if mscale else {})


def _rope(header: CheckpointHeader, config: ModelConfig) -> dict[str, object]:
    scaling = config.rope_scaling
    match scaling.kind:
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
        case "yarn":
            found: dict[str, object] = {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": scaling.factor,
                "rope.scaling.original_context_length": scaling.original_context,
                "rope.scaling.yarn_beta_fast": scaling.beta_fast,
                "rope.scaling.yarn_beta_slow": scaling.beta_slow,
            }
            factor = scaling.attention_factor
            if factor is None:
                return found
            # llama.cpp multiplies YaRN's own factor by the second and does not read the first.
            return found | {
                "rope.scaling.yarn_attn_factor": factor,
                "rope.scaling.attn_factor": factor / (0.1 * math.log(scaling.factor) + 1),
            }
        case "divisors" | "table" if scaling.attention_factor is not None:
            return {
                "rope.scaling.attn_factor": scaling.attention_factor,
                "rope.scaling.original_context_length": scaling.original_context or config.context_length,
            }
    return {}


def rope_tensors(header: CheckpointHeader, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors that say what config.json says of the frequencies: ``rope_freqs``, ``rope_factors_*``."""
    scaling = config.rope_scaling
    if scaling.kind == "llama3":
        plain, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, RopeScaling())
        scaled, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, scaling)
        return {"rope_freqs.weight": plain / scaled}
    if scaling.kind == "divisors":
        rope = rope_keys(json_keys(header))
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope.numbers(f"{length}_factor"))
            for length in ("long", "short")
        }
    return {}


def lost(before: ModelConfig, after: ModelConfig) -> list[str]:
    """The fields of a config that its GGUF file does not bring back, rope scaling aside."""
    # A bias is where its tensor is, and a scale of 1/sqrt(head_dim) need not be said.
    spelled = {"architecture", "rope_scaling", "qkv_bias", "output_bias", "mlp_bias", "moe", "norm_offset"}
    spelled |= {"tied_head"} if after.architecture in WITH_OWN_HEAD and before.tied_head else set()
    spelled |= {"attention_scale"} if _alike(_scale(before), _scale(after)) else set()
    found = [
        field.name
        for field in fields(before)
        if field.name not in spelled
        and not _alike(getattr(before, field.name), getattr(after, field.name, None))
    ]
    if not _alike(_magnitude(before), _magnitude(after)):
        found.append("rope_scaling.mscale beside mscale_all_dim")
    if before.rope_scaling.kind == "yarn" and before.rope_scaling.truncate != after.rope_scaling.truncate:
        found.append(f"rope_scaling.truncate {before.rope_scaling.truncate}")
    return found + _lost_of_experts(before.moe, after.moe)


def _lost_of_experts(before: MoeConfig | None, after: MoeConfig | None) -> list[str]:
    """Of the fields that say how tokens are sent to experts; the others say how these are stored."""
    if before is None or after is None:
        return [] if before is after else ["moe"]
    names = [
        "experts",
        "per_token",
        "intermediate_size",
        "layers",
        "routing",
        "shared_size",
        "scale",
        "groups",
    ]
    names += ["kept_groups"] if before.groups > 1 else []
    names += ["renormalize"] if before.routing != "top_k_softmax" else []
    return [f"moe.{name}" for name in names if not _alike(getattr(before, name), getattr(after, name))]


def _magnitude(config: ModelConfig) -> float:
    """Of cosines and sines under YaRN."""
    if config.rope_scaling.kind != "yarn":
        return 1.0
    return rotary_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)[1]


def _scale(config: ModelConfig) -> float:
    return config.attention_scale or config.head_dim**-0.5


def _alike(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * abs(one)
    if isinstance(one, tuple) and isinstance(other, tuple) and not any((*one, *other)):
        return True
    return one == other
