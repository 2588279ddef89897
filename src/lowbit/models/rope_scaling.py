"""How positions are stretched: the rope scaling that a config.json or GGUF metadata ask for.

An unknown kind is refused by name. Sources: transformers' rope utilities, the GGUF specification.
"""

from __future__ import annotations

import math

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.layers.rotary import RopeScaling
from lowbit.models.config_keys import MAX_SIZE, ConfigKeys


def rope_keys(keys: ConfigKeys, layer_type: str = "full_attention") -> ConfigKeys:
    """The rope section: transformers >= 5 writes rope_parameters (nested by layer type where layers
    differ), older versions rope_scaling beside rope_theta.

    Where both are there, as after a recipe's rope_scaling was added to a newer file, rope_scaling counts, for
    layers that see all tokens where they differ.
    """
    section = keys.section("rope_parameters")
    if is_nested(section):
        nested = section.get(layer_type)
        section = nested if isinstance(nested, dict) else {}
        if layer_type != "full_attention":
            return ConfigKeys(section, f"{keys.place}: rope")
    return ConfigKeys(section | _old_section(keys), f"{keys.place}: rope")


def is_nested(section: dict[str, object]) -> bool:
    """Whether rope_parameters have a section for each type of layer."""
    return any(isinstance(value, dict) for value in section.values())


def _old_section(keys: ConfigKeys) -> dict[str, object]:
    """``rope_scaling``, its kind under the newer name."""
    section = dict(keys.section("rope_scaling"))
    if "type" in section:
        section.setdefault("rope_type", section.pop("type"))
    return section


def scaling_from_json(rope: ConfigKeys, keys: ConfigKeys, context: int) -> RopeScaling:
    """The rope scaling a config.json asks for; an unknown kind is refused by name."""
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    original = "original_max_position_embeddings"
    nested = is_nested(keys.section("rope_parameters"))
    trained = rope.size(original, context) if nested else keys.size(original, rope.size(original, context))
    if kind == "su" or (kind == "yarn" and rope.has("short_factor")):
        kind = "longrope"  # as Phi-3's files of spring 2024 call it
    match kind:
        case "default":
            return RopeScaling()
        case "dynamic":
            return RopeScaling("dynamic", _factor(rope, 1.0), context)
        case "linear":
            return RopeScaling("linear", _factor(rope))
        case "llama3":
            return RopeScaling(
                "llama3",
                _factor(rope),
                trained,
                rope.number("low_freq_factor"),
                rope.number("high_freq_factor"),
            )
        case "yarn":
            return RopeScaling(
                "yarn",
                _factor(rope, context / trained if context != trained else None),
                trained,
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                attention_factor=rope.optional("attention_factor"),
                mscale=rope.optional("mscale"),
                mscale_all_dim=rope.optional("mscale_all_dim"),
                truncate=rope.flag("truncate", True),
            )
        case "longrope":
            return _longrope(rope, context, trained)
    raise LowbitError(
        "E0242",
        f"{rope.place}: rope type {printable(repr(kind))} is not supported; "
        "supported: default, linear, dynamic, llama3, yarn, longrope",
    )


def _factor(rope: ConfigKeys, default: float | None = None) -> float:
    factor = rope.number("factor", default)
    if factor <= 0:
        raise LowbitError("E0216", f"{rope.place}: key 'factor' must be above 0, found {factor:g}")
    return factor


def served_context(rope: ConfigKeys, keys: ConfigKeys, scaling: RopeScaling, architecture: str) -> int:
    """The longest sequence that a config.json's scaling is made for, as vLLM reckons it.

    Recipes that stretch a model leave its max_position_embeddings alone: Qwen's for YaRN, Vicuna's 16k.
    """
    context, original = keys.size("max_position_embeddings"), "original_max_position_embeddings"
    longest = float(context)
    if scaling.kind == "linear" and not _says_all(architecture):
        longest = context * scaling.factor
    elif scaling.kind == "yarn" and (rope.has(original) or keys.has(original)):
        longest = scaling.original_context * scaling.factor
    if longest > MAX_SIZE:
        raise LowbitError(
            "E0216",
            f"{rope.place}: factor {scaling.factor:g} makes a context of {longest:g} tokens, at most "
            f"{MAX_SIZE} are supported",
        )
    return max(context, int(longest))


def stated_context(scaling: RopeScaling, context: int, architecture: str) -> int:
    """The max_position_embeddings that ``served_context`` makes this context of."""
    if scaling.kind != "linear" or _says_all(architecture):
        return context
    return max(1, round(context / scaling.factor))


def _says_all(architecture: str) -> bool:
    """Whether max_position_embeddings has the factor of a linear scaling in it (Gemma 3's)."""
    return architecture.lower().startswith("gemma3")


def longer(scaling: RopeScaling, rotary_dim: int, theta: float, context: int) -> float:
    """The rotary base for sequences of more tokens than the model's own.

    Dynamic NTK's grows with the length of each sequence. A token's K must not depend on how long its sequence
    becomes later: all get the one of the longest.
    """
    if scaling.kind != "dynamic" or rotary_dim <= 2 or context <= scaling.original_context:
        return theta
    grown = scaling.factor * context / scaling.original_context - (scaling.factor - 1)
    return float(theta * grown ** (rotary_dim / (rotary_dim - 2)))


def local_rope(keys: ConfigKeys, context: int, theta: float) -> tuple[float, RopeScaling]:
    """The base and the scaling of layers with a window; ``theta``: where config.json does not say."""
    if not is_nested(keys.section("rope_parameters")):  # what there is, is of layers that see all tokens
        return theta, RopeScaling()
    local = rope_keys(keys, "sliding_attention")
    part, everywhere = (one.number("partial_rotary_factor", 1.0) for one in (local, rope_keys(keys)))
    if part != everywhere:
        raise LowbitError(
            "E0242",
            f"{local.place}: partial_rotary_factor {part:g} in layers with a window and {everywhere:g} in "
            "the others is not supported; only the same in all is",
        )
    return local.number("rope_theta", theta), scaling_from_json(local, keys, context)


def _longrope(rope: ConfigKeys, context: int, trained: int) -> RopeScaling:
    """A model made for more than its trained context always uses its long factors: a token's K must not
    depend on how long its sequence becomes later."""
    factor = rope.number("factor", context / trained)
    stretch = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return RopeScaling(
        "divisors",
        factor,
        trained,
        attention_factor=rope.number("attention_factor", stretch),
        divisors=rope.numbers("long_factor" if context > trained else "short_factor"),
    )


def scaling_from_gguf(keys: ConfigKeys, header: CheckpointHeader) -> RopeScaling:
    """The rope scaling that metadata or tensors of divisors ask for."""
    if "rope_freqs.weight" in header.tensors:  # Llama-3 scaling is a tensor of divisors, not metadata
        return RopeScaling("table", tensor="rope_freqs.weight")
    if "rope_factors_long.weight" in header.tensors:
        context = keys.size("context_length")
        long = context > keys.size("rope.scaling.original_context_length", context)
        return RopeScaling(
            "table",
            attention_factor=keys.optional("rope.scaling.attn_factor"),
            tensor=f"rope_factors_{'long' if long else 'short'}.weight",
        )
    kind = keys.text("rope.scaling.type", "linear")
    if kind == "linear":  # a factor alone means it too, which files of 2023 call scale_linear; 0 is none
        factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
        return RopeScaling("linear", factor) if factor not in (0, 1) else RopeScaling()
    if kind == "none":
        return RopeScaling()
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            keys.number("rope.scaling.factor"),
            keys.size("rope.scaling.original_context_length"),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(keys),
        )
    raise LowbitError(
        "E0242",
        f"{keys.place}.rope.scaling.type {printable(repr(kind))} is not supported; "
        "supported: none, linear, yarn",
    )


def _yarn_attention_factor(keys: ConfigKeys) -> float | None:
    """The factor on cosines and sines, where it is not YaRN's own.

    ``attn_factor`` is what llama.cpp multiplies that by: 1 in every file that it writes itself.
    """
    whole = keys.optional("rope.scaling.yarn_attn_factor")
    more = keys.number("rope.scaling.attn_factor", 1.0)
    if whole or more in (0, 1):
        return whole or None
    factor = keys.number("rope.scaling.factor")
    return more * (0.1 * math.log(factor) + 1) if factor > 1 else more
