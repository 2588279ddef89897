"""ModelConfig: the sizes and constants of a decoder, from config.json or from GGUF metadata.

A missing or absurd key is an error that names the file and the key; nothing that changes meaning has a
silent default. Sources: transformers' LlamaConfig, the GGUF specification (formats.md 2.7.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.layers.rotary import RopeScaling

MAX_SIZE = 1 << 24  # no published model has a dimension, vocabulary or context near it


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP. ``layers``: the layers that have one.

    ``routing``: ``softmax_top_k``, ``top_k_softmax``, ``group_softmax`` or ``group_sigmoid`` (DeepSeek-V2's
    and -V3's; ``groups`` and ``kept_groups`` are for them). ``renormalize``: the weights sum to 1, as
    ``top_k_softmax``'s always do; then they are multiplied by ``scale``. ``router``: the router's name under
    the MLP. ``shared_size``: the width of the MLP beside the experts, ``shared``; where ``shared_gate`` names
    a row, times its sigmoid.
    """

    experts: int
    per_token: int
    intermediate_size: int
    layers: frozenset[int]
    routing: str = "softmax_top_k"
    renormalize: bool = True
    router: str = "gate"
    router_bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0
    shared_size: int = 0
    shared: str = "shared_experts"
    shared_gate: str = ""
    expert_bias: bool = False
    interleaved: bool = False  # stacked gate and up rows in turn
    transposed: bool = False  # plain stacked weights as (experts, in, out)

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.experts:
            raise LowbitError(
                "E0216",
                f"the model's config sends each token to {self.per_token} of {self.experts} experts; it is "
                "damaged or of another kind",
            )
        size, left = divmod(self.experts, self.groups)
        pairs = size >= 2 or self.routing != "group_sigmoid"  # a group's score is the sum of two
        if left or self.kept_groups > self.groups or self.per_token > size * self.kept_groups or not pairs:
            raise LowbitError(
                "E0216",
                f"the model's config sends each token to {self.per_token} experts in {self.kept_groups} of "
                f"{self.groups} groups of {self.experts} experts; it is damaged or of another kind",
            )


@dataclass(frozen=True)
class NormNames:
    """What a layer's norms are called in a Hugging Face checkpoint; "" where there is no such norm.

    ``attention`` and ``mlp`` come before the two halves of a block, the others after them, before the
    residual is added. Without ``attention`` the projections see the residual stream itself.
    """

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    attention_post: str = ""
    mlp_post: str = ""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Dimensions in elements, contexts in tokens."""

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rotary_dim: int
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    activation: str = "silu"
    gated: bool = True  # False: an MLP of two matrices
    sub_norms: bool = False  # RMSNorm before the output and the down projection (BitNet)
    norm_head: bool = False  # each row of the head is divided by its norm (Baichuan 2)
    learned_positions: bool = False  # a vector a position is added to the embedding (GPT-2)
    layer_norm: bool = False  # LayerNorm in place of RMSNorm
    norm_bias: bool = False
    norm_names: NormNames = NormNames()
    parallel: bool = False  # attention and MLP both see the block's input, without an MLP norm under one norm
    # A norm of Q and K before the rotation: over each head ("head"), over all of a projection ("projection"),
    # or a LayerNorm over each head with weights of its own ("layer").
    qk_norm: str = ""
    rotates_neighbours: bool = False  # dimensions 2j and 2j + 1 turn together, not j and j + half
    unrotated: frozenset[int] = frozenset()  # layers without a rotary embedding
    norm_offset: float = 0.0  # added to every norm weight (Gemma in safetensors stores weight - 1)
    windows: tuple[int, ...] = ()  # tokens each layer sees, 0 = all; empty = all layers see all
    local_rope_theta: float | None = None  # another base for the layers with a window
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # on what attention and MLP give, before the residual is added
    sinks: bool = False  # a learned logit for each head in the softmax sum (gpt-oss)
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        divisors = len(self.rope_scaling.divisors)
        checks = (
            (divisors in (0, self.rotary_dim // 2), f"{divisors} rope factors"),
            (self.heads % self.kv_heads == 0, f"{self.heads} heads over {self.kv_heads} K/V heads"),
            (self.rotary_dim <= self.head_dim, f"rotary dimension {self.rotary_dim} of {self.head_dim}"),
            (self.rotary_dim % 2 == 0, f"an odd rotary dimension {self.rotary_dim}"),
            (0 < self.norm_eps < 1, f"norm epsilon {self.norm_eps}"),
            (0 < self.rope_theta < 1e12, f"rope_theta {self.rope_theta}"),
            (self.residual_scale > 0, f"a residual multiplier of {self.residual_scale}"),
            (self.logit_scale > 0, f"logits times {self.logit_scale}"),
        )
        for sound, what in checks:
            if not sound:
                raise LowbitError("E0216", f"the model's config has {what}; it is damaged or of another kind")


class ConfigKeys:
    """Typed access to a dictionary of config keys; every refusal names file and key."""

    def __init__(self, values: dict[str, object], place: str) -> None:
        self.values = values
        self.place = place

    def _fail(self, key: str, expected: str) -> LowbitError:
        found = printable(repr(self.values[key])) if key in self.values else "nothing"
        return LowbitError("E0216", f"{self.place}: key {key!r} must be {expected}, found {found}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise self._fail(key, f"a whole number from 1 to {MAX_SIZE}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A number that may be 0, or null for none."""
        if key in self.values and self.values[key] in (None, 0):
            return 0
        return default if default == 0 and not self.has(key) else self.size(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fail(key, "a finite number")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(
            isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in value
        ):
            raise self._fail(key, "a list of positive numbers")
        return tuple(float(x) for x in value)

    def optional(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._fail(key, "a string")
        return value

    def section(self, key: str) -> dict[str, object]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._fail(key, "an object")
        return value


def architecture_of(header: CheckpointHeader) -> str:
    """``LlamaForCausalLM`` from config.json's ``architectures``, ``llama`` from GGUF metadata."""
    if header.container == "gguf":
        return ConfigKeys(header.metadata, header.root.name).text("general.architecture")
    listed = header.config.get("architectures")
    if isinstance(listed, list) and listed and isinstance(listed[0], str):
        return listed[0]
    raise LowbitError(
        "E0216", f"{header.root.name}/config.json: key 'architectures' must list the model's class"
    )


def json_keys(header: CheckpointHeader) -> ConfigKeys:
    """The keys of config.json."""
    return ConfigKeys(header.config, f"{header.root.name}/config.json")


def gguf_keys(header: CheckpointHeader) -> ConfigKeys:
    """The metadata keys under the architecture's prefix, without it."""
    name = architecture_of(header)
    prefix = f"{name}."
    values = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    return ConfigKeys(values, f"{header.root.name}: {name}")


def base_config(
    header: CheckpointHeader, *, rotated: float = 1.0, theta: float = 10000.0, tied: bool = False
) -> ModelConfig:
    """What all decoders share; a family changes what it does otherwise.

    What a config.json without the key means in this family: ``rotated``: the part of a head that turns;
    ``theta``: the rotary base; ``tied``: whether the head is the embedding.
    """
    return _from_gguf(header) if header.container == "gguf" else _from_json(header, rotated, theta, tied)


def _from_json(header: CheckpointHeader, rotated: float, theta: float, tied: bool) -> ModelConfig:
    keys = json_keys(header)
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if not keys.has("head_dim") and hidden % heads:
        raise LowbitError(
            "E0216", f"{keys.place}: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    head_dim = keys.size("head_dim", hidden // heads)
    context = keys.size("max_position_embeddings")
    rope = rope_keys(keys)
    partial = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", rotated))
    return ModelConfig(
        architecture=architecture_of(header),
        hidden_size=hidden,
        layers=keys.size("num_hidden_layers"),
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=keys.size("intermediate_size"),
        vocab_size=keys.size("vocab_size"),
        context_length=context,
        norm_eps=_norm_eps(keys, ("rms_norm_eps", "layer_norm_eps")),
        rope_theta=rope.number("rope_theta", keys.number("rope_theta", theta)),
        rotary_dim=int(head_dim * partial),
        rope_scaling=scaling_from_json(rope, keys, context),
        tied_head=keys.flag("tie_word_embeddings", tied),
        activation=keys.text("hidden_activation", keys.text("hidden_act", "silu")),
    )


def _norm_eps(keys: ConfigKeys, names: tuple[str, ...]) -> float:
    """By the first of these names that is there."""
    return keys.number(next((name for name in names if keys.has(name)), names[0]))


def rope_keys(keys: ConfigKeys, layer_type: str = "full_attention") -> ConfigKeys:
    """The rope section: transformers >= 5 writes rope_parameters (nested by layer type where layers
    differ), older versions rope_scaling beside rope_theta."""
    section = keys.section("rope_parameters")
    nested = section.get(layer_type)
    if isinstance(nested, dict):
        section = nested
    return ConfigKeys(section or keys.section("rope_scaling"), f"{keys.place}: rope")


def scaling_from_json(rope: ConfigKeys, keys: ConfigKeys, context: int) -> RopeScaling:
    """The rope scaling a config.json asks for; an unknown kind is refused by name."""
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    original = "original_max_position_embeddings"
    trained = rope.size(original, keys.size(original, context))
    match kind:
        # Dynamic NTK leaves the frequencies alone up to the trained context, which is all lowbit serves.
        case "default" | "dynamic":
            return RopeScaling()
        case "linear":
            return RopeScaling("linear", rope.number("factor"))
        case "llama3":
            return RopeScaling(
                "llama3",
                rope.number("factor"),
                rope.size(original),
                rope.number("low_freq_factor"),
                rope.number("high_freq_factor"),
            )
        case "yarn":
            return RopeScaling(
                "yarn",
                rope.number("factor", context / trained if context != trained else None),
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


def _from_gguf(header: CheckpointHeader) -> ModelConfig:
    keys = gguf_keys(header)
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    if not keys.has("attention.key_length") and hidden % heads:
        raise LowbitError(
            "E0216", f"{keys.place}: embedding_length {hidden} is no multiple of head_count {heads}"
        )
    head_dim = keys.size("attention.key_length", hidden // heads)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LowbitError("E0209", f"{header.root.name}: no tensor 'token_embd.weight'; not a whole model")
    return ModelConfig(
        architecture=architecture_of(header),
        hidden_size=hidden,
        layers=keys.size("block_count"),
        heads=heads,
        kv_heads=keys.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=keys.size("feed_forward_length"),
        vocab_size=embedding.shape[0],  # vocab_size may be absent, and may differ from the rows
        context_length=keys.size("context_length"),
        norm_eps=_norm_eps(keys, ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rotary_dim=keys.size("rope.dimension_count", head_dim),
        rope_scaling=_scaling_from_gguf(keys, header),
        tied_head="output.weight" not in header.tensors,
        qkv_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & set(header.tensors)),
        output_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
    )


def _scaling_from_gguf(keys: ConfigKeys, header: CheckpointHeader) -> RopeScaling:
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
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", keys.number("rope.scaling.factor"))
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            keys.number("rope.scaling.factor"),
            keys.size("rope.scaling.original_context_length"),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=keys.optional("rope.scaling.yarn_attn_factor")
            or keys.optional("rope.scaling.attn_factor"),
        )
    raise LowbitError(
        "E0242",
        f"{keys.place}.rope.scaling.type {printable(repr(kind))} is not supported; "
        "supported: none, linear, yarn",
    )
