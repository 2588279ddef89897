"""Families that are Llama under other names, or Llama with a factor or a norm more.

InternLM 2 and 3 (Cai et al., 2024), Baichuan 1 and 2 (Yang et al., 2023), MiniCPM (Hu et al., 2024), EXAONE
3, 3.5 and 4 (LG AI Research, 2024, 2025), BitNet b1.58 (Ma et al., 2025), Seed-OSS (ByteDance, 2025), ERNIE
4.5 (Baidu, 2025), Hunyuan (Tencent, 2025).

    InternLM 2   wqkv holds, for each K/V head, the rows of its queries, its K and its V
    Baichuan     W_pack holds Q, K and V one below another; version 2 divides each row of the head by its norm
    MiniCPM      embeddings, what a layer adds, and logits are scaled
    EXAONE 4     norms follow attention and MLP and none precedes them; layers without a window do not rotate
    BitNet       a norm more before the output and the down projection
    ERNIE 4.5    neighbours rotate
    Hunyuan      each head of Q and K has a norm behind its rotation; a factor alpha of the rotary base
"""

from __future__ import annotations

import math
from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, MoeConfig, NormNames, base_config
from lowbit.models.config_keys import ConfigKeys, architecture_of, gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import SLIDING, UNUSED, experts_in_gguf, layer_types, windows_in_gguf
from lowbit.models.families.spelling import aliases, respelled, untold
from lowbit.models.gguf_names import (
    BITNET_GGUF_NAMES,
    GEMMA_GGUF_NAMES,
    GGUF_NAMES,
    HUNYUAN_GGUF_NAMES,
    POST_NORM_GGUF_NAMES,
)
from lowbit.models.registry import Family
from lowbit.models.rope_scaling import rope_keys

NORM_HEAD_WORDS = 125696  # Baichuan 2 is told by its vocabulary alone
BAICHUAN_ALIBI_LAYERS = 40  # the 13B models'
POST_NORMS = NormNames("", "", "post_attention_layernorm", "post_feedforward_layernorm")


def _internlm(header: CheckpointHeader) -> ModelConfig:
    """InternLM 1 and 2: one key for the biases of attention, 3: one for Q, K and V and one for the rest."""
    config = base_config(header)
    if header.container == "gguf":
        return config
    keys = json_keys(header)
    bias = keys.flag("bias", keys.flag("attention_bias", False))
    if architecture_of(header) == "InternLM3ForCausalLM":
        mlp_bias = keys.flag("bias", False)
        return replace(config, qkv_bias=keys.flag("qkv_bias", bias), output_bias=bias, mlp_bias=mlp_bias)
    return replace(config, qkv_bias=bias, output_bias=bias)


def _baichuan(header: CheckpointHeader) -> ModelConfig:
    in_gguf = header.container == "gguf"
    keys = gguf_keys(header) if in_gguf else json_keys(header)
    layers = keys.size("block_count" if in_gguf else "num_hidden_layers")
    if layers == BAICHUAN_ALIBI_LAYERS or not (in_gguf or keys.has("max_position_embeddings")):
        raise LowbitError(
            "E0242",
            f"{keys.place}: Baichuan 13B tells positions by ALiBi, which lowbit's attention does not have; "
            "the 7B models are supported",
        )
    config = base_config(header)
    return replace(config, norm_head=config.vocab_size == NORM_HEAD_WORDS and not in_gguf)


def _minicpm(header: CheckpointHeader) -> ModelConfig:
    config = base_config(respelled(header, tie_word_embeddings=True))
    if header.container == "gguf":
        keys = gguf_keys(header)
        # Files from before the keys existed are of the first models, whose numbers these are.
        embedding = keys.number("embedding_scale", 12.0)
        residual = keys.number("residual_scale", 1.4 / math.sqrt(config.layers))
        logits = keys.number("logit_scale", config.hidden_size / 256)
    else:
        keys = json_keys(header)
        embedding = keys.number("scale_emb", 1.0)
        residual = keys.number("scale_depth", 1.0) / math.sqrt(config.layers)
        logits = config.hidden_size / keys.size("dim_model_base", 1)
        for key, what in (("num_experts", "MiniCPM with experts"), ("sparse_config", "sparse attention")):
            if keys.values.get(key):
                raise LowbitError("E0241", f"{keys.place}: {key} asks for {what}, which is not supported")
    return replace(config, embedding_scale=embedding, residual_scale=residual, logit_scale=1 / logits)


def _exaone(header: CheckpointHeader) -> ModelConfig:
    return base_config(
        respelled(
            header,
            {
                "num_hidden_layers": "num_layers",
                "rms_norm_eps": "layer_norm_epsilon",
                "hidden_act": "activation_function",
            },
        )
    )


def exaone4(header: CheckpointHeader) -> ModelConfig:
    """Without windows (the 1.2B) every layer rotates."""
    config = base_config(header)
    in_gguf = header.container == "gguf"
    keys = gguf_keys(header) if in_gguf else json_keys(header)
    if in_gguf:  # layers that predict further tokens are counted, and lie behind the model's own
        config = replace(config, layers=config.layers - keys.count("nextn_predict_layers", 0))
    key = "attention.sliding_window" if in_gguf else "sliding_window"
    window = keys.count(key) if key in keys.values else 0 if in_gguf else 4096
    windows: tuple[int, ...] = ()
    if window and in_gguf:
        windows = windows_in_gguf(keys, window, config.layers, 4)
    elif window:
        local = _local_layers(keys, config.layers)
        windows = tuple(window if is_local else 0 for is_local in local)
    unrotated = frozenset(n for n, size in enumerate(windows) if not size)
    return replace(config, qk_norm="head", norm_names=POST_NORMS, windows=windows, unrotated=unrotated)


def _local_layers(keys: ConfigKeys, layers: int) -> list[bool]:
    """Which layers have a window: as the config lists them, or by a pattern that repeats."""
    if keys.has("layer_types"):
        return [kind == SLIDING for kind in layer_types(keys.values["layer_types"], layers)]
    pattern = keys.values.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return [pattern[n % len(pattern)] == "L" and n + 1 < layers for n in range(layers)]
    period = keys.size("sliding_window_pattern", 4)
    return [(n + 1) % period != 0 for n in range(layers)]


def _bitnet(header: CheckpointHeader) -> ModelConfig:
    config = replace(base_config(header, theta=500000.0), sub_norms=True)
    if header.container == "gguf":
        # No key tells the activation: the first models (24 and 26 layers) have silu, Microsoft's relu2.
        return replace(config, activation="silu" if config.layers in (24, 26) else "relu2")
    keys = json_keys(header)
    bias = keys.flag("attention_bias", False)
    return replace(config, qkv_bias=bias, output_bias=bias, activation=keys.text("hidden_act", "relu2"))


def _seed_oss(header: CheckpointHeader) -> ModelConfig:
    config = base_config(untold(header, head_dim=128))
    if header.container == "gguf":
        return config
    keys = json_keys(header)
    return replace(
        config,
        qkv_bias=keys.flag("attention_bias", True),
        output_bias=keys.flag("attention_out_bias", False),
        mlp_bias=keys.flag("mlp_bias", False),
    )


def _ernie(header: CheckpointHeader) -> ModelConfig:
    config = base_config(untold(header, head_dim=128), theta=500000.0, tied=True)
    config = replace(config, rotates_neighbours=True)
    if header.container == "gguf":
        return config
    bias = json_keys(header).flag("use_bias", False)
    return replace(config, qkv_bias=bias, output_bias=bias, mlp_bias=bias)


def _hunyuan(header: CheckpointHeader) -> ModelConfig:
    config = replace(base_config(_with_alpha(header)), qk_norm="head", norms_rotated=True)
    if header.container == "gguf":
        return config
    bias = json_keys(header).flag("attention_bias", False)
    return replace(config, qkv_bias=bias, output_bias=bias)


def _with_alpha(header: CheckpointHeader) -> CheckpointHeader:
    """A rotary embedding of kind ``dynamic`` with ``alpha`` is a plain one with another base, at every length
    (as GGUF files have it)."""
    if header.container == "gguf":
        return header
    keys = json_keys(header)
    rope = rope_keys(keys)
    kind = rope.values.get("rope_type", rope.values.get("type"))
    if kind != "dynamic" or not rope.values.get("alpha"):
        return header
    dim = keys.size("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    base = theta * rope.number("alpha") ** (dim / (dim - 2)) if dim > 2 else theta
    plain = {"rope_type": "default", "rope_theta": base}
    return replace(header, config=header.config | {"rope_parameters": plain, "rope_scaling": None})


def _hunyuan_moe(header: CheckpointHeader) -> ModelConfig:
    """Experts beside a shared MLP of the dense width, in every layer."""
    config = _hunyuan(header)
    if header.container == "gguf":
        keys = gguf_keys(header)
        count, used, inner, shared = experts_in_gguf(keys)
    else:
        keys = json_keys(header)
        count, used = _of_all_layers(keys, "num_experts"), _of_all_layers(keys, "moe_topk")
        inner = _of_all_layers(keys, "moe_intermediate_size", config.intermediate_size)
        shared = _of_all_layers(keys, "num_shared_expert", 1) * config.intermediate_size
        if keys.has("use_cla") and keys.flag("use_cla", False):
            raise LowbitError(
                "E0242", f"{keys.place}: use_cla true (layers that share K and V) is not supported"
            )
    layers = frozenset(range(config.layers))
    moe = MoeConfig(count, used, inner, layers, renormalize=True, shared_size=shared, shared="shared_mlp")
    return replace(config, moe=moe)


def _of_all_layers(keys: ConfigKeys, key: str, default: int | None = None) -> int:
    """A number, which may be listed for each layer."""
    listed = keys.values.get(key)
    if not isinstance(listed, list) or not listed:
        return keys.size(key, default)
    if listed.count(listed[0]) != len(listed):
        raise LowbitError(
            "E0242", f"{keys.place}: key {key!r} differs from layer to layer, which is not supported"
        )
    return ConfigKeys({key: listed[0]}, keys.place).size(key)


_INTERNLM2 = aliases(
    "model.layers.{n}",
    {
        "input_layernorm": "attention_norm",
        "self_attn.qkv_proj": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    },
    {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"},
)
_EXAONE = aliases(
    "transformer.h.{n}",
    {
        "input_layernorm": "ln_1",
        "self_attn.q_proj": "attn.attention.q_proj",
        "self_attn.k_proj": "attn.attention.k_proj",
        "self_attn.v_proj": "attn.attention.v_proj",
        "self_attn.o_proj": "attn.attention.out_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    },
    {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"},
)
_HUNYUAN = (
    (r"\.self_attn\.q_norm$", ".self_attn.query_layernorm"),
    (r"\.self_attn\.k_norm$", ".self_attn.key_layernorm"),
    (r"\.mlp\.gate$", ".mlp.gate.wg"),
)
_BAICHUAN = aliases("model.layers.{n}", {"self_attn.qkv_proj": "self_attn.W_pack"})

INTERNLM = Family("internlm", _internlm, build, GGUF_NAMES, True, UNUSED)
INTERNLM2 = Family("internlm2", _internlm, build, GGUF_NAMES, True, UNUSED, _INTERNLM2, grouped_qkv=True)
BAICHUAN = Family("baichuan", _baichuan, build, GGUF_NAMES, True, UNUSED, _BAICHUAN)
MINICPM = Family("minicpm", _minicpm, build, GGUF_NAMES, True, UNUSED)
EXAONE = Family(
    "exaone", _exaone, build, GGUF_NAMES, False, (*UNUSED, r"transformer\.rotary\.inv_freq"), _EXAONE
)
EXAONE4 = Family("exaone4", exaone4, build, GEMMA_GGUF_NAMES, False, UNUSED, prediction_layers=True)
SEED_OSS = Family("seed_oss", _seed_oss, build, POST_NORM_GGUF_NAMES, False, UNUSED)
ERNIE = Family("ernie4_5", _ernie, build, GGUF_NAMES, False, UNUSED)
HUNYUAN = Family("hunyuan_dense", _hunyuan, build, GGUF_NAMES, False, UNUSED, _HUNYUAN)
HUNYUAN_MOE = Family("hunyuan_moe", _hunyuan_moe, build, HUNYUAN_GGUF_NAMES, False, UNUSED, _HUNYUAN)
BITNET = Family("bitnet", _bitnet, build, BITNET_GGUF_NAMES, False, UNUSED)
