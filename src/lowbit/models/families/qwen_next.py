"""Qwen3-Next (Qwen team, 2025) and Qwen3.5 (2026): three of four layers are gated delta networks, the fourth
attention with an output gate; experts everywhere, beside a shared one, or (Qwen3.5) plain MLPs."""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.kernels.recurrent import StateSpec
from lowbit.models.config import ModelConfig, MoeConfig, base_config, widened
from lowbit.models.config_keys import ConfigKeys, gguf_keys, json_keys
from lowbit.models.families.common import FULL, UNUSED, layer_types
from lowbit.models.families.qwen import sparse_layers
from lowbit.models.families.spelling import respelled, untold
from lowbit.models.gguf_names import QWEN_NEXT_GGUF_NAMES
from lowbit.models.qwen_next import QwenNextConfig, build
from lowbit.models.registry import Family

_TAKE = "take the config of the original model"


def _qwen3_next(header: CheckpointHeader) -> ModelConfig:
    base = base_config(respelled(header, head_dim=256), rotated=0.25)
    if header.container == "gguf":
        return _from_gguf(base, gguf_keys(header))
    keys = json_keys(header)
    if base.activation != "silu":
        raise LowbitError(
            "E0242", f"{keys.place}: activation {printable(base.activation)!r} is not supported; only silu is"
        )
    key_heads, value_heads, k_dim, v_dim, taps = (
        _needed(keys, f"linear_{name}")
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    )
    moe = None
    if keys.count("num_experts"):
        moe = _experts(
            keys.size("num_experts"),
            keys.size("num_experts_per_tok"),
            keys.size("moe_intermediate_size"),
            keys.size("shared_expert_intermediate_size"),
            sparse_layers(keys, base.layers),
            keys.flag("norm_topk_prob", True),
        )
    bias, mlx = keys.flag("attention_bias", False), _is_mlx(header, taps)
    return widened(
        QwenNextConfig,
        base,
        qk_norm="head",
        norm_offset=0.0 if mlx else 1.0,
        mlx=mlx,
        qkv_bias=bias,
        output_bias=bias,
        moe=moe,
        state=_state(keys, key_heads, value_heads, k_dim, v_dim, taps),
        recurrent=_recurrent(keys, base.layers),
    )


_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_EXPERTS_35 = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


def _qwen3_5(header: CheckpointHeader) -> ModelConfig:
    """Plain MLPs."""
    if header.container == "gguf":
        return _as_tiled(_qwen3_next(header))
    return _qwen3_next(_gated(untold(replace(header, config=header.config | {"num_experts": 0}), **_LINEAR)))


def _qwen3_5_moe(header: CheckpointHeader) -> ModelConfig:
    """Every layer has experts, whose weights sum to 1; no MLP has a width of its own."""
    if header.container == "gguf":
        return _as_tiled(_qwen3_next(_wide(header)))
    header = _gated(untold(header, **_LINEAR, **_EXPERTS_35))
    always = {"intermediate_size": header.config["moe_intermediate_size"], "norm_topk_prob": True}
    always |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return _qwen3_next(replace(header, config=header.config | always))


def _gated(header: CheckpointHeader) -> CheckpointHeader:
    """E0242 where attention has no output gate."""
    keys = json_keys(header)
    if not keys.flag("attn_output_gate", True):
        raise LowbitError("E0242", f"{keys.place}: attn_output_gate false is not supported; only true is")
    return header


def _wide(header: CheckpointHeader) -> CheckpointHeader:
    """Files of models without a plain MLP have no key for its width."""
    width = gguf_keys(header).size("expert_feed_forward_length")
    return replace(header, metadata={"qwen35moe.feed_forward_length": width} | header.metadata)


def _as_tiled(config: ModelConfig) -> ModelConfig:
    """A GGUF file's, whose value heads lie otherwise where a key head has several."""
    assert isinstance(config, QwenNextConfig), "read by this family"
    return replace(config, tiled=config.state.heads > config.state.k_heads > 1)


def _is_mlx(header: CheckpointHeader, taps: int) -> bool:
    """Whether mlx-lm rewrote the model: config.json does not say it, the shape of a convolution does."""
    convolutions = (name for name in header.tensors if name.endswith(".linear_attn.conv1d.weight"))
    first = next(convolutions, None)
    return first is not None and taps > 1 and header.tensors[first].shape[1:] == (taps, 1)


def _from_gguf(base: ModelConfig, keys: ConfigKeys) -> ModelConfig:
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % heads:
        raise LowbitError(
            "E0216", f"{keys.place}: ssm.inner_size {inner} over {heads} value heads; the file is damaged"
        )
    state = _state(
        keys,
        keys.size("ssm.group_count"),
        heads,
        keys.size("ssm.state_size"),
        inner // heads,
        keys.size("ssm.conv_kernel"),
    )
    moe = None
    if keys.count("expert_count", 0):
        moe = _experts(
            keys.size("expert_count"),
            keys.size("expert_used_count"),
            keys.size("expert_feed_forward_length"),
            keys.size("expert_shared_feed_forward_length"),
            list(range(base.layers - keys.count("nextn_predict_layers", 0))),
            True,
        )
    # Layers that predict further tokens are counted, and lie behind the model's own.
    layers = base.layers - keys.count("nextn_predict_layers", 0)
    recurrent, told = _every(keys.size("full_attention_interval", 4), layers), "attention.recurrent_layers"
    if keys.has(told):
        listed = keys.values[told]
        if not isinstance(listed, list) or len(listed) != base.layers:
            raise LowbitError(
                "E0216", f"{keys.place}: {told} does not list {base.layers} layers; the file is damaged"
            )
        recurrent = frozenset(n for n in range(layers) if listed[n])
    return widened(
        QwenNextConfig,
        base,
        qk_norm="head",
        layers=layers,
        moe=moe,
        state=state,
        recurrent=recurrent,
        gguf=True,
    )


def _needed(keys: ConfigKeys, key: str) -> int:
    if not keys.has(key):
        raise LowbitError(
            "E0216", f"{keys.place}: key {key!r} is missing, which sizes the linear attention layers; {_TAKE}"
        )
    return keys.size(key)


def _state(keys: ConfigKeys, k_heads: int, heads: int, k_dim: int, v_dim: int, taps: int) -> StateSpec:
    if heads % k_heads:
        raise LowbitError(
            "E0216",
            f"{keys.place}: {heads} value heads over {k_heads} key heads of linear attention: the first must "
            f"be a multiple of the second; {_TAKE}",
        )
    return StateSpec(k_heads, heads, k_dim, v_dim, taps)


def _recurrent(keys: ConfigKeys, layers: int) -> frozenset[int]:
    """The layers of linear attention."""
    types = keys.values.get("layer_types")
    if types is None:
        return _every(keys.size("full_attention_interval", 4), layers)
    kinds = layer_types(types, layers, ("linear_attention", FULL))
    return frozenset(n for n, kind in enumerate(kinds) if kind != FULL)


def _every(interval: int, layers: int) -> frozenset[int]:
    """All but every ``interval``-th layer."""
    return frozenset(n for n in range(layers) if (n + 1) % interval)


def _experts(
    count: int, used: int, inner: int, shared: int, layers: list[int], renormalize: bool
) -> MoeConfig:
    return MoeConfig(
        count,
        used,
        inner,
        frozenset(layers),
        renormalize=renormalize,
        shared_size=shared,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    )


# The layers that predict further tokens are a module of their own, and in GGUF files the last blocks.
_PREDICTION = r"(model\.)?mtp\..+"
QWEN3_NEXT = Family(
    "qwen3_next",
    _qwen3_next,
    build,
    QWEN_NEXT_GGUF_NAMES,
    False,
    (*UNUSED, _PREDICTION),
    prediction_layers=True,
)
QWEN3_5 = replace(QWEN3_NEXT, name="qwen3_5", read_config=_qwen3_5)
QWEN3_5_MOE = replace(QWEN3_NEXT, name="qwen3_5_moe", read_config=_qwen3_5_moe)
