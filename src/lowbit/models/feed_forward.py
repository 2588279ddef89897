"""The second half of a block: an MLP, gated or not, or experts with what belongs to them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lowbit.layers.cuts import Cut
from lowbit.layers.experts import ExpertsSpec
from lowbit.layers.linear import Part
from lowbit.layers.mlp import GatedMlp, MixtureOfExperts, PlainMlp
from lowbit.layers.norm import Norm
from lowbit.layers.routing import (
    Route,
    group_limited_sigmoid,
    group_limited_softmax,
    softmax_top_k,
    top_k_softmax,
)
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig, MoeConfig

FeedForward = GatedMlp | PlainMlp | MixtureOfExperts


def down_norm_name(layer: int) -> str:
    """The tensor that scales what the down projection sees, where there is one."""
    return f"model.layers.{layer}.mlp.ffn_sub_norm.weight"


def feed_forward(config: ModelConfig, loader: WeightLoader, layer: int) -> FeedForward:
    """The MLP of a layer, or its mixture of experts."""
    moe, mlp = config.moe, f"model.layers.{layer}.mlp"
    if not config.gated:
        return _plain(config, loader, mlp)
    if moe is None or layer not in moe.layers:
        found, cut = _gated(config, loader, mlp, config.intermediate_size)
        if not config.sub_norms:
            return found
        weight = loader.vector(down_norm_name(layer), config.intermediate_size)
        return replace(found, norm=norm_of_inner(loader, weight, config.norm_eps, cut))
    router = Part(f"{mlp}.{moe.router}", (moe.experts, config.hidden_size), bias=moe.router_bias, router=True)
    spec = ExpertsSpec(
        moe.experts,
        config.hidden_size,
        moe.intermediate_size,
        bias=moe.expert_bias,
        interleaved=moe.interleaved,
        transposed=moe.transposed,
    )
    shared = shared_gate = None
    if moe.shared_size:
        shared, _ = _gated(config, loader, f"{mlp}.{moe.shared}", moe.shared_size)
        if loader.parallel.size > 1:
            shared = replace(shared, partial=True)  # the experts' sum takes it along
    if moe.shared_gate:
        row = Part(f"{mlp}.{moe.shared_gate}", (1, config.hidden_size), router=True)
        shared_gate = loader.linear(row.name, [row])
    return MixtureOfExperts(
        loader.linear(router.name, [router]),
        _route(moe, loader, mlp),
        loader.experts(f"{mlp}.experts", spec),
        config.activation,
        shared,
        shared_gate,
    )


def _plain(config: ModelConfig, loader: WeightLoader, mlp: str) -> PlainMlp:
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    up = Part(f"{mlp}.up_proj", (inner, hidden), bias=bias)
    down = Part(f"{mlp}.down_proj", (hidden, inner), bias=bias)
    cut = loader.inner_cut(up.name, [up], down)
    up, down = replace(up, rows=cut), replace(down, columns=cut)
    return PlainMlp(loader.linear(up.name, [up]), loader.linear(down.name, [down]), config.activation)


def _gated(config: ModelConfig, loader: WeightLoader, mlp: str, inner: int) -> tuple[GatedMlp, Cut | None]:
    """The MLP, and which of its inner entries are here."""
    hidden, name = config.hidden_size, f"{mlp}.gate_up_proj"
    gate_up = [
        Part(f"{mlp}.gate_proj", (inner, hidden), bias=config.mlp_bias),
        Part(f"{mlp}.up_proj", (inner, hidden), bias=config.mlp_bias),
    ]
    down = Part(f"{mlp}.down_proj", (hidden, inner), bias=config.mlp_bias)
    cut = loader.inner_cut(name, gate_up, down)
    gate_up = [replace(part, rows=cut) for part in gate_up]
    down = replace(down, columns=cut)
    return GatedMlp(loader.linear(name, gate_up), loader.linear(down.name, [down]), config.activation), cut


def norm_of_inner(loader: WeightLoader, weight: Tensor, eps: float, cut: Cut | None) -> Norm:
    """An RMSNorm of entries of which only those of ``cut`` are here; ``weight``: of all."""
    if cut is None:
        return Norm(weight, eps)
    here = weight[cut.slice] if cut.order is None else weight[cut.order]
    return Norm(here, eps, parallel=loader.parallel, whole=len(weight), counts=cut.first_of_its_kind)


def _route(moe: MoeConfig, loader: WeightLoader, mlp: str) -> Route:
    match moe.routing:
        case "top_k_softmax":
            return top_k_softmax(moe.per_token)
        case "group_sigmoid":
            name = moe.correction or f"{moe.router}.e_score_correction_bias"
            correction = loader.vector(f"{mlp}.{name}", moe.experts)
            return group_limited_sigmoid(
                moe.per_token, moe.groups, moe.kept_groups, moe.renormalize, moe.scale, correction
            )
        case "group_softmax":
            return group_limited_softmax(
                moe.per_token, moe.groups, moe.kept_groups, moe.renormalize, moe.scale
            )
    return softmax_top_k(moe.per_token, moe.renormalize, moe.scale)
