"""Families with an MLP of two matrices, mostly with LayerNorm.

GPT-2 (Radford et al., 2019), GPT-NeoX and Pythia (Black et al., 2022; Biderman et al., 2023), Falcon
(Almazrouei et al., 2023), Phi-1 and Phi-2 (Li et al., 2023), StarCoder2 (Lozhkov et al., 2024), Nemotron and
Minitron (NVIDIA, 2024), Arcee (Arcee AI, 2025).

    GPT-2       positions are learned vectors; matrices lie as (in, out)
    GPT-NeoX    Q, K and V of each head in turn; attention and MLP side by side, each with a norm
    Falcon      one K/V head (7B), or groups of queries with their K and V (40B); side by side
    Phi         attention and MLP side by side under one norm; the head has a bias
    Nemotron    a squared ReLU; 1 is added to the norms' weights (in GGUF it already is)
    Arcee       Llama with a squared ReLU in place of the gated activation
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.models.config import ModelConfig, NormNames, base_config
from lowbit.models.config_keys import gguf_keys, json_keys
from lowbit.models.decoder import build
from lowbit.models.families.common import UNUSED
from lowbit.models.families.spelling import aliases, respelled
from lowbit.models.gguf_names import FALCON_GGUF_NAMES, GGUF_NAMES
from lowbit.models.registry import Family

ONE_NORM = NormNames(mlp="")


def _plain(config: ModelConfig, header: CheckpointHeader, bias: bool, activation: str) -> ModelConfig:
    """LayerNorms and the MLP without a gate; ``bias`` of every layer, where GGUF's tensors do not tell."""
    qkv = output = mlp = bias
    if header.container == "gguf":
        stored = [
            f"blk.0.{stem}.bias" in header.tensors for stem in ("attn_qkv", "attn_q", "attn_output", "ffn_up")
        ]
        qkv, output, mlp = stored[0] or stored[1], stored[2], stored[3]
    return replace(
        config,
        layer_norm=True,
        norm_bias=True,
        gated=False,
        qkv_bias=qkv,
        output_bias=output,
        mlp_bias=mlp,
        activation=activation,
    )


def _starcoder2(header: CheckpointHeader) -> ModelConfig:
    config = base_config(respelled(header, {"rms_norm_eps": "norm_epsilon"}, tie_word_embeddings=True))
    if header.container == "gguf":
        return _plain(config, header, True, "gelu_pytorch_tanh")
    keys = json_keys(header)
    window = keys.size("sliding_window") if keys.has("sliding_window") else 0
    config = replace(config, windows=(window,) * config.layers if window else ())
    activation = keys.text("hidden_act", "gelu_pytorch_tanh")
    return _plain(config, header, keys.flag("use_bias", True), activation)


def _phi(header: CheckpointHeader) -> ModelConfig:
    config = base_config(respelled(header, partial_rotary_factor=0.5))
    config = replace(config, parallel=True, norm_names=ONE_NORM)
    if header.container == "gguf":
        head_bias = "output.bias" in header.tensors
        return _plain(replace(config, head_bias=head_bias), header, True, "gelu_new")
    keys = json_keys(header)
    if keys.flag("qk_layernorm", False):
        raise LowbitError("E0242", f"{keys.place}: qk_layernorm true is not supported for Phi-1 and Phi-2")
    return _plain(replace(config, head_bias=True), header, True, keys.text("hidden_act", "gelu_new"))


def _falcon(header: CheckpointHeader) -> ModelConfig:
    if header.container == "gguf":
        two_norms = "blk.0.attn_norm_2.weight" in header.tensors
        names = NormNames("ln_attn", "ln_mlp") if two_norms else ONE_NORM
        config = replace(base_config(header), parallel=True, norm_names=names)
        return _plain(config, header, False, "gelu")
    keys = json_keys(header)
    if keys.flag("alibi", False):
        raise LowbitError(
            "E0242",
            f"{keys.place}: alibi true: lowbit's attention has no ALiBi; the rotary models are supported",
        )
    grouped = keys.flag("new_decoder_architecture", False)
    heads = keys.size("num_attention_heads", keys.size("n_head", 1))
    kv_heads = 1 if keys.flag("multi_query", True) else heads
    if grouped:
        kv_heads = keys.size("num_kv_heads", keys.size("n_head_kv", heads))
    header = respelled(
        header,
        {
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation",
            "intermediate_size": "ffn_hidden_size",
        },
        intermediate_size=4 * keys.size("hidden_size"),
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        hidden_act="gelu",
    )
    config = base_config(replace(header, config=header.config | {"num_key_value_heads": kv_heads}))
    names = NormNames()
    parallel = grouped or keys.flag("parallel_attn", True)
    if parallel:
        two_norms = grouped and keys.size("num_ln_in_parallel_attn", 2) == 2
        names = NormNames("ln_attn", "ln_mlp") if two_norms else ONE_NORM
    config = replace(config, parallel=parallel, norm_names=names)
    return _plain(config, header, keys.flag("bias", False), config.activation)


def _gpt_neox(header: CheckpointHeader) -> ModelConfig:
    spelled = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
    config = base_config(respelled(header, spelled, partial_rotary_factor=0.25, hidden_act="gelu"))
    if header.container == "gguf":
        parallel = gguf_keys(header).flag("use_parallel_residual", True)
        return _plain(replace(config, parallel=parallel), header, True, "gelu")
    keys = json_keys(header)
    config = replace(config, parallel=keys.flag("use_parallel_residual", True))
    config = _plain(config, header, True, config.activation)
    bias = keys.flag("attention_bias", True)
    return replace(config, qkv_bias=bias, output_bias=bias)


def _gpt2(header: CheckpointHeader) -> ModelConfig:
    spelled = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    known = respelled(header, spelled, tie_word_embeddings=True, hidden_act="gelu_new")
    known = respelled(known, intermediate_size=4 * json_keys(known).size("hidden_size", 1))
    config = base_config(known)
    if header.container != "gguf":
        keys = json_keys(header)
        for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            if keys.flag(key, usual) is not usual:
                told = str(not usual).lower()
                raise LowbitError("E0242", f"{keys.place}: {key} {told} is not supported for GPT-2")
    unrotated = frozenset(range(config.layers))
    activation = config.activation if header.container != "gguf" else "gelu_new"
    return _plain(replace(config, unrotated=unrotated, learned_positions=True), header, True, activation)


def _arcee(header: CheckpointHeader) -> ModelConfig:
    config = replace(base_config(respelled(header, hidden_act="relu2")), gated=False)
    if header.container == "gguf":
        return replace(config, activation="relu2", mlp_bias="blk.0.ffn_up.bias" in header.tensors)
    keys = json_keys(header)
    bias = keys.flag("attention_bias", False)
    return replace(config, qkv_bias=bias, output_bias=bias, mlp_bias=keys.flag("mlp_bias", False))


def _nemotron(header: CheckpointHeader) -> ModelConfig:
    spelled = respelled(header, {"rms_norm_eps": "norm_eps"}, hidden_act="relu2")
    config = base_config(spelled, rotated=0.5)
    if header.container == "gguf":
        return _plain(config, header, False, "relu2")
    keys = json_keys(header)
    bias = keys.flag("attention_bias", False)
    config = _plain(replace(config, norm_offset=1.0), header, bias, config.activation)
    return replace(config, mlp_bias=keys.flag("mlp_bias", False))


_GPT2_INSIDE = {
    "input_layernorm": "ln_1",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_GPT2_OUTSIDE = {"model.embed_tokens": "wte", "model.embed_positions": "wpe", "model.norm": "ln_f"}
_GPT2 = (
    *aliases(
        "transformer.h.{n}", _GPT2_INSIDE, {k: f"transformer.{own}" for k, own in _GPT2_OUTSIDE.items()}
    ),
    *aliases("h.{n}", _GPT2_INSIDE, _GPT2_OUTSIDE),  # the first ones, saved without the head's class
)
_GPT_NEOX = aliases(
    "gpt_neox.layers.{n}",
    {
        "input_layernorm": "input_layernorm",
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    {
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
)
_FALCON = aliases(
    "transformer.h.{n}",
    {
        **{name: name for name in ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp")},
        "self_attn.qkv_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    {"model.embed_tokens": "transformer.word_embeddings", "model.norm": "transformer.ln_f"},
)
_STARCODER2 = aliases("model.layers.{n}", {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})
_PHI = aliases(
    "model.layers.{n}",
    {"self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    {"model.norm": "model.final_layernorm"},
)
_MASKS = r"(?:transformer\.)?(?:gpt_neox\.layers|h)\.\d+\.(?:attn|attention)\.(?:masked_)?bias"

STARCODER2 = Family("starcoder2", _starcoder2, build, GGUF_NAMES, False, UNUSED, _STARCODER2)
PHI = Family("phi", _phi, build, GGUF_NAMES, False, UNUSED, _PHI)
FALCON = Family("falcon", _falcon, build, FALCON_GGUF_NAMES, False, UNUSED, _FALCON, grouped_qkv=True)
GPT_NEOX = Family(
    "gpt_neox", _gpt_neox, build, GGUF_NAMES, False, (*UNUSED, _MASKS), _GPT_NEOX, grouped_qkv=True
)
ARCEE = Family("arcee", _arcee, build, GGUF_NAMES, True, UNUSED)
NEMOTRON = Family("nemotron", _nemotron, build, GGUF_NAMES, False, UNUSED)
GPT2 = Family("gpt2", _gpt2, build, GGUF_NAMES, False, (*UNUSED, _MASKS), _GPT2, transposed=True)
