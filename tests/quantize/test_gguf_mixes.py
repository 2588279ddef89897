"""llama-quantize's mixes: expected types written out by hand, and facts from llama.cpp's own snapshots."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lowbit.errors import LowbitError
from lowbit.quantize.gguf_blocks import ENCODABLE, block_weights
from lowbit.quantize.gguf_mixes import ALIASES, MIXES, REFUSED, ModelFacts, mix_name, type_of

HIDDEN, INNER = 4096, 14336
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (1024, HIDDEN),
    "attn_v": (1024, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
PLAIN = {"attn_q", "attn_k", "ffn_gate", "ffn_up"}  # the base type in every mix below
# Of 32 layers: the first four, the last four, every third between.
MORE = (0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31)
ALL = tuple(range(32))


def facts(kv_heads: int = 32, **changes: object) -> ModelFacts:
    return ModelFacts(**{"layers": 32, "heads": 32, "kv_heads": kv_heads, **changes})  # type: ignore[arg-type]


def layers_of(
    mix: str, model: ModelFacts, kind: str, shape: Sequence[int]
) -> dict[str | None, tuple[int, ...]]:
    found: dict[str | None, list[int]] = {}
    for layer in range(model.layers):
        found.setdefault(type_of(mix, model, f"blk.{layer}.{kind}.weight", shape), []).append(layer)
    return {name: tuple(layers) for name, layers in found.items()}


def without(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(layer for layer in ALL if layer not in layers)


# mix: (base, attn_v with one query head a KV head, with eight, ffn_down, attn_output); None is the base.
EXPECTED: dict[str, tuple[str, dict | None, dict | None, dict | None, dict | None]] = {
    **{name: (name.upper(), None, None, None, None) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")},
    **{name: (name.upper(), None, None, None, None) for name in ("tq1_0", "tq2_0", "q1_0", "nvfp4", "q6_k")},
    "mxfp4_moe": ("Q8_0", None, None, None, None),
    "q2_k": ("Q2_K", {"Q3_K": ALL}, {"Q4_K": ALL}, {"Q3_K": ALL}, {"Q3_K": ALL}),
    "q3_k_s": ("Q3_K", None, None, None, None),
    "q3_k_m": (
        "Q3_K",
        {"Q5_K": (0, 1), "Q4_K": without((0, 1))},
        {"Q5_K": (0, 1), "Q4_K": without((0, 1))},
        {"Q5_K": (0, 1), "Q4_K": without((0, 1))},  # 32 / 16 layers
        {"Q4_K": ALL},
    ),
    "q3_k_l": ("Q3_K", {"Q5_K": ALL}, {"Q5_K": ALL}, {"Q5_K": ALL}, {"Q5_K": ALL}),
    "q4_k_s": (
        "Q4_K",
        {"Q5_K": (0, 1, 2, 3), "Q4_K": without((0, 1, 2, 3))},
        {"Q5_K": (0, 1, 2, 3), "Q4_K": without((0, 1, 2, 3))},
        {"Q5_K": (0, 1, 2, 3), "Q4_K": without((0, 1, 2, 3))},
        None,
    ),
    "q4_k_m": ("Q4_K", *[{"Q6_K": MORE, "Q4_K": without(MORE)}] * 3, None),
    "q5_k_s": ("Q5_K", None, None, None, None),
    "q5_k_m": ("Q5_K", *[{"Q6_K": MORE, "Q5_K": without(MORE)}] * 3, None),
    "iq3_s": ("IQ3_S", None, {"Q4_K": ALL}, None, None),
    "iq3_m": (
        "IQ3_S",
        {"Q4_K": ALL},
        {"Q4_K": ALL},
        {"Q4_K": (0, 1, 2, 3), "IQ3_S": without((0, 1, 2, 3))},
        {"Q4_K": ALL},
    ),
    "iq4_nl": ("IQ4_NL", None, {"Q5_K": ALL}, {"Q5_K": (0, 1, 2, 3), "IQ4_NL": without((0, 1, 2, 3))}, None),
    "iq4_xs": ("IQ4_XS", None, {"Q5_K": ALL}, {"Q5_K": (0, 1, 2, 3), "IQ4_XS": without((0, 1, 2, 3))}, None),
    "f16": ("F16", None, None, None, None),
    "bf16": ("BF16", None, None, None, None),
}


def test_every_mix_is_expected_and_every_type_can_be_written() -> None:
    assert set(EXPECTED) == set(MIXES)
    assert set(MIXES.values()) <= set(ENCODABLE)


@pytest.mark.parametrize("mix", MIXES)
def test_a_dense_model(mix: str) -> None:
    base, alone, shared, down, output = EXPECTED[mix]
    for kv_heads, values in ((32, alone), (4, shared)):
        model = facts(kv_heads)
        wanted = {"attn_v": values, "ffn_down": down, "attn_output": output}
        for kind, shape in SHAPES.items():
            expected = None if kind in PLAIN else wanted[kind]
            assert layers_of(mix, model, kind, shape) == (expected or {base: ALL}), (kv_heads, kind)


@pytest.mark.parametrize("mix", MIXES)
def test_the_output_and_the_embedding(mix: str) -> None:
    base = EXPECTED[mix][0]
    floats = mix in ("f16", "bf16")
    best = base if floats or base == "Q8_0" else "Q6_K"
    vocabulary = (32000, HIDDEN)
    assert type_of(mix, facts(), "output.weight", vocabulary) == best
    assert type_of(mix, facts(tied=True), "token_embd.weight", vocabulary) == best
    untied = "Q4_K" if mix in ("tq1_0", "tq2_0") else base
    assert type_of(mix, facts(), "token_embd.weight", vocabulary) == untied
    # 96 columns: whole blocks of 32 only.
    odd = type_of(mix, facts(), "output.weight", (32000, 96))
    assert odd == (base if floats else "Q8_0")


@pytest.mark.parametrize("mix", MIXES)
def test_eight_experts(mix: str) -> None:
    """Layers are those of the names, so that tensors of one layer may share a rule."""
    model = facts(8, experts=8)
    base, _, _, down, _ = EXPECTED[mix]
    floats = mix in ("f16", "bf16")
    for kind in ("attn_v", "attn_k"):
        assert layers_of(mix, model, kind, SHAPES[kind]) == {base if floats else "Q8_0": ALL}
    raised = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs")
    assert layers_of(mix, model, "attn_output", (HIDDEN, HIDDEN)) == {"Q5_K" if mix in raised else base: ALL}
    experts = (8, HIDDEN, INNER)
    if mix == "iq3_m":
        down = {"Q4_K": MORE, "IQ3_S": without(MORE)}
    expected = {"MXFP4": ALL} if mix == "mxfp4_moe" else down or {base: ALL}
    assert layers_of(mix, model, "ffn_down_exps", experts) == expected
    assert type_of(mix, model, "blk.3.ffn_gate_exps.weight", experts) == MIXES[mix]
    assert type_of(mix, model, "blk.3.ffn_gate_inp.weight", (8, HIDDEN)) is None


# Rows of 96 weights: what a type with blocks of 256 becomes.
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "NVFP4": "F16",
    "Q1_0": "F16",
}


@pytest.mark.parametrize("mix", MIXES)
def test_rows_that_are_no_whole_number_of_blocks(mix: str) -> None:
    base = EXPECTED[mix][0]
    name = "blk.9.ffn_up.weight"
    assert type_of(mix, facts(), name, (64, 96)) == FALLBACKS.get(base, base)
    assert type_of(mix, facts(), name, (64, 100)) == (base if base == "BF16" else "F16")
    chosen = {type_of(mix, facts(), f"blk.{i}.ffn_down.weight", (64, 96)) for i in range(32)}
    assert all(name is not None and 96 % block_weights(name) == 0 for name in chosen)


def test_a_raised_type_falls_back_from_what_it_was_raised_to() -> None:
    """Layer 0 would be Q6_K, layer 4 Q4_K."""
    assert type_of("q4_k_m", facts(), "blk.0.ffn_down.weight", (64, 96)) == "Q8_0"
    assert type_of("q4_k_m", facts(), "blk.4.ffn_down.weight", (64, 96)) == "Q5_0"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("output_norm.weight", (HIDDEN,)),
        ("blk.0.attn_norm.weight", (HIDDEN,)),
        ("blk.0.attn_q_norm.weight", (32, 128)),
        ("blk.0.attn_q.bias", (HIDDEN,)),
        ("blk.0.ffn_up_exps.bias", (8, HIDDEN)),
        ("blk.0.ffn_gate_inp.weight", (64, HIDDEN)),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, HIDDEN)),
        ("blk.0.attn_sinks.weight", (32,)),
        ("rope_freqs.weight", (64,)),
        ("position_embd.weight", (512, HIDDEN)),
        ("blk.0.ssm_conv1d.weight", (4, HIDDEN)),
        ("blk.0.time_mix_w1.weight", (64, HIDDEN)),
    ],
)
def test_what_stays_float(name: str, shape: tuple[int, ...]) -> None:
    for mix in MIXES:
        assert type_of(mix, facts(), name, shape) is None


def test_counters_count_the_tensors_that_exist() -> None:
    """Half of the layers have an attn_v, and the first layers no ffn_down."""
    model = facts(value_layers=range(1, 32, 2), down_layers=range(8, 32))
    values = [layer for layer in model.value_layers or () if _value(model, layer) == "Q6_K"]
    # 16 tensors: the first two, the last two, every third between (4, 7, 10, 13); layer 2 i + 1 each.
    assert values == [1, 3, 9, 15, 21, 27, 29, 31]
    down = [layer for layer in range(8, 32) if _down(model, layer) == "Q6_K"]
    # i = layer - 8 of 32: 0..3, 6, 9, …; the last eighth would begin at i = 28.
    assert down == [8, 9, 10, 11, 14, 17, 20, 23, 26, 29]
    # With experts, the layer is the name's.
    assert _down(facts(down_layers=range(8, 32), experts=4), 8) == "Q4_K"


def _value(model: ModelFacts, layer: int) -> str | None:
    return type_of("q4_k_m", model, f"blk.{layer}.attn_v.weight", SHAPES["attn_v"])


def _down(model: ModelFacts, layer: int) -> str | None:
    return type_of("q4_k_m", model, f"blk.{layer}.ffn_down.weight", SHAPES["ffn_down"])


@pytest.mark.parametrize(
    ("architecture", "layers", "kv_heads", "raised"),
    [
        ("llama", 80, 8, True),
        ("llama", 80, 64, False),  # 65B
        ("llama", 60, 8, False),
        ("qwen2", 80, 64, True),
        ("qwen3", 80, 8, False),
    ],
)
def test_values_of_70b_models_get_more_bits(
    architecture: str, layers: int, kv_heads: int, raised: bool
) -> None:
    model = ModelFacts(layers, 64, kv_heads, architecture=architecture)
    shape = (1024, 8192)
    assert (layers_of("q3_k_s", model, "attn_v", shape) == {"Q5_K": tuple(range(layers))}) is raised
    assert ("Q4_K" not in layers_of("q4_k_m", model, "attn_v", shape)) is raised
    assert "Q4_K" in layers_of("q4_k_m", model, "ffn_down", shape)


def test_fused_and_latent_values_count_as_values() -> None:
    for kind in ("attn_qkv", "attn_kv_b"):
        assert layers_of("q4_k_m", facts(), kind, (3072, HIDDEN)) == {"Q6_K": MORE, "Q4_K": without(MORE)}
    # The two halves that converters cut kv_b into have no rule.
    assert layers_of("q4_k_m", facts(), "attn_v_b", (32, 128, 512)) == {"Q4_K": ALL}


def test_snapshots_of_llama_cpp() -> None:
    """Layers that llama.cpp's tests record for Qwen3-0.6B, Llama-3.1-70B, gpt-oss-120b, DeepSeek-V3.1."""
    shape = (1024, 4096)
    qwen = ModelFacts(28, 16, 8, architecture="qwen3")
    more = (0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27)
    assert layers_of("q4_k_m", qwen, "attn_v", shape)["Q6_K"] == more
    assert layers_of("q5_k_m", qwen, "ffn_down", shape)["Q6_K"] == more
    assert layers_of("q4_k_s", qwen, "ffn_down", shape)["Q5_K"] == (0, 1, 2)
    assert layers_of("q4_k_s", qwen, "attn_v", shape)["Q5_K"] == (0, 1, 2, 3)
    assert layers_of("q3_k_m", qwen, "ffn_down", shape)["Q5_K"] == (0,)
    llama = ModelFacts(80, 64, 8)
    assert set(layers_of("q2_k", llama, "attn_v", shape)) == {"Q5_K"}
    assert layers_of("q3_k_m", llama, "ffn_down", shape)["Q5_K"] == (0, 1, 2, 3, 4)
    oss = ModelFacts(36, 64, 8, experts=128, architecture="gpt-oss")
    wanted = (0, 1, 2, 3, *range(6, 31, 3), 31, 32, 33, 34, 35)
    assert layers_of("q4_k_m", oss, "ffn_down_exps", (128, 2880, 3072))["Q6_K"] == wanted
    assert type_of("q4_k_m", oss, "output.weight", (201088, 2880)) == "Q8_0"
    deepseek = ModelFacts(61, 128, 1, experts=256, architecture="deepseek2", value_layers=())
    assert layers_of("q3_k_m", deepseek, "ffn_down", shape)["Q5_K"] == (0, 1, 2)
    assert type_of("q3_k_m", deepseek, "blk.3.ffn_down_shexp.weight", shape) == "Q4_K"


def test_names_as_users_write_them() -> None:
    assert mix_name(" Q4_K_M ") == mix_name("q4-k-m") == mix_name("Q4_K") == "q4_k_m"
    assert all(mix_name(alias) in MIXES for alias in ALIASES)


@pytest.mark.parametrize("mix", REFUSED)
def test_a_mix_that_cannot_be_made_is_refused_by_name(mix: str) -> None:
    with pytest.raises(LowbitError, match=f"{mix} ") as caught:
        type_of(mix, facts(), "output.weight", (32, 256))
    assert caught.value.code == "E0402" and "q4_k_m" in caught.value.message
    assert ("importance matrix" in caught.value.message) == (mix != "q2_0")


def test_an_unknown_mix_names_the_nearest() -> None:
    with pytest.raises(
        LowbitError, match=r"'q4_km' is no GGUF mix.*did you mean q4_k_m.*Known: q4_0"
    ) as caught:
        mix_name("q4_km")
    assert caught.value.code == "E0402"
    with pytest.raises(LowbitError, match=r"Known: q4_0") as caught:
        mix_name("\x1b[31mwhatever")
    assert "\x1b" not in caught.value.message
