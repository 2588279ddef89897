"""The language model inside a checkpoint that also sees pictures: its config, and what stands beside it.

config.json nests it under ``text_config`` or spells it out at the top (Qwen2-VL); keys that equal the class's
defaults may be missing there, and have to be known here. Pictures have no way in: the tensors of the vision
tower and of the projector are known and not used. For text the three positions of mrope (Qwen2-VL: Wang et
al., 2024) are one, so that it is plain RoPE. Sources: the published configs and their transformers classes.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.models.config import ModelConfig
from lowbit.models.families.deepseek import DEEPSEEK
from lowbit.models.families.gemma import GEMMA2, GEMMA3
from lowbit.models.families.glm import GLM4, GLM4_MOE
from lowbit.models.families.llama import LLAMA, MINISTRAL3, MISTRAL, MIXTRAL
from lowbit.models.families.phi import PHI3
from lowbit.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from lowbit.models.families.qwen_next import QWEN3_5, QWEN3_5_MOE
from lowbit.models.registry import Family

Json = dict[str, object]

# How names of tensors begin that belong to vision (or audio) and its connection to the text.
BESIDE = (
    r"(?:model\.)?(?:vision|visual|audio)(?:_tower|_model|_encoder|_embed_tokens)?\.",
    r"(?:model\.)?(?:multi_modal_projector|mm_projector|connector|image_newline|patch_merger|modality_projection)\b",
)


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, context: int, words: int) -> Json:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "vocab_size": words,
        "rms_norm_eps": 1e-6,
    }


_QWEN2_VL = _sizes(8192, 29568, 80, 64, 8, 32768, 152064)
_QWEN2_VL |= {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_window_layers": 80}
_QWEN3_VL: Json = {"head_dim": 128, "rope_theta": 500000.0}
_GEMMA = _sizes(2304, 9216, 26, 8, 4, 131072, 262208) | {"head_dim": 256, "tie_word_embeddings": True}
# What a text_config of this model_type leaves out: transformers 4 wrote what differs from these only.
_DEFAULTS: dict[str, Json] = {
    "llama": _sizes(4096, 11008, 32, 32, 32, 2048, 32000),
    "mistral": _sizes(4096, 14336, 32, 32, 8, 131072, 32000) | {"sliding_window": 4096},
    "ministral3": _sizes(4096, 14336, 34, 32, 8, 262144, 131072) | {"rms_norm_eps": 1e-5},
    "mixtral": _sizes(4096, 14336, 32, 32, 8, 131072, 32000)
    | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": _sizes(4096, 22016, 32, 32, 32, 32768, 151936),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3": _sizes(4096, 22016, 32, 32, 32, 32768, 151936),
    "qwen3_moe": _sizes(2048, 6144, 24, 32, 4, 32768, 151936)
    | {"num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "qwen3_vl_text": _sizes(4096, 22016, 32, 32, 32, 128000, 151936) | _QWEN3_VL,
    "qwen3_vl_moe_text": _sizes(2048, 5632, 24, 16, 16, 128000, 151936)
    | _QWEN3_VL
    | {
        "num_local_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,
    },
    "qwen3_5_text": _sizes(4096, 12288, 32, 16, 4, 32768, 248320),
    "qwen3_5_moe_text": _sizes(2048, 512, 40, 16, 2, 32768, 248320),
    # Whose class knows no part of a head but all of it, unless told.
    "glm4v_text": _sizes(4096, 13696, 40, 32, 2, 32768, 151552)
    | {"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0, "attention_bias": True},
    "glm4v_moe_text": _sizes(4096, 10944, 46, 96, 8, 65536, 151424)
    | {"rms_norm_eps": 1e-5, "attention_bias": True, "n_routed_experts": 128, "n_shared_experts": 1}
    | {"moe_intermediate_size": 1408, "num_experts_per_tok": 8, "first_k_dense_replace": 1},
    "gemma2": _GEMMA | {"vocab_size": 256000, "max_position_embeddings": 8192},
    "gemma3_text": _GEMMA,
    "phi3": _sizes(3072, 8192, 32, 32, 32, 4096, 32064) | {"rms_norm_eps": 1e-5},
}
_FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_vl": QWEN2,
    "qwen2_vl_text": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen2_5_vl_text": QWEN2,
    "qwen3": QWEN3,
    "qwen3_vl_text": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_vl_moe_text": QWEN3_MOE,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "glm4v_text": GLM4,
    "glm4v_moe_text": GLM4_MOE,
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": DEEPSEEK,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
}
# Where the class of the language model alone tells what its config leaves out.
_CLASSES = dict.fromkeys(("deepseek_v3", "kimi_k2"), "DeepseekV3ForCausalLM")


def text_header(header: CheckpointHeader) -> CheckpointHeader:
    """The header with the language model's own config at the top."""
    whole = header.config
    nested = whole.get("text_config")
    text: Json = dict(nested) if isinstance(nested, dict) else dict(whole)
    kind = str(text.get("model_type"))
    config = _DEFAULTS.get(kind, {}) | text
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if kind == "glm4v_text" and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        config["head_dim"] = hidden // heads  # whatever else is said
    told = {holder["tie_word_embeddings"] for holder in (config, whole) if "tie_word_embeddings" in holder}
    if len(told) != 1:  # nothing, or the two contradict each other, as classes' defaults do
        stored = any(name.rpartition(".")[0].endswith("lm_head") for name in header.tensors)
        config["tie_word_embeddings"] = not stored
    else:
        config["tie_word_embeddings"] = told.pop()
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if isinstance(section, dict) and "mrope" in (section.get("rope_type"), section.get("type")):
            config[key] = section | {"rope_type": "default", "type": "default"}
    classes = [_CLASSES[kind]] if kind in _CLASSES else whole.get("architectures")
    return replace(header, config=config | {"architectures": classes})


def text_family(header: CheckpointHeader) -> Family:
    """The family of the language model, reading the config where it lies."""
    nested = header.config.get("text_config")
    holder = nested if isinstance(nested, dict) else header.config
    kind = holder.get("model_type")
    family = _FAMILIES.get(str(kind))
    if family is None:
        raise LowbitError(
            "E0241",
            f"{header.root.name}/config.json: the language model inside is {printable(repr(kind))}, which is "
            f"not supported here; supported: {', '.join(sorted(_FAMILIES))}",
        )

    def read_config(header: CheckpointHeader) -> ModelConfig:
        return _as_stacked(family.read_config(text_header(header)), header)

    return replace(family, read_config=read_config, beside=BESIDE)


def _as_stacked(config: ModelConfig, header: CheckpointHeader) -> ModelConfig:
    """Qwen3-VL's experts were published as (experts, in, out) and are saved as (experts, out, in) since."""
    stack = next((e for n, e in header.tensors.items() if n.endswith(".mlp.experts.down_proj")), None)
    if config.moe is None or stack is None or len(stack.shape) != 3:
        return config
    turned = stack.shape[1:] == (config.moe.intermediate_size, config.hidden_size)
    return replace(config, moe=replace(config.moe, transposed=turned and stack.shape[1] != stack.shape[2]))
