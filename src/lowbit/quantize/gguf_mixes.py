"""llama-quantize's mixes: which GGUF type each tensor of a model gets (llama.cpp's source, August 2026).

    type_of("q4_k_m", ModelFacts(layers=32, heads=32, kv_heads=8), "blk.0.ffn_down.weight", (4096, 14336))
    -> "Q6_K"

A mix is a base type with exceptions: tensors that lose most from few bits (values, ffn_down, the output) get
more. "More bits" of some mixes means the first and the last eighth of the layers and every third between.
The i of a rule counts tensors that exist, in the order of layers: ``value_layers`` for attn_v, attn_qkv and
attn_kv_b; for ffn_down of a model without experts ``down_layers``, against the number of all layers; with
experts the layer is that of the name. All rules are those of a run without importance matrix.

What is easily missed there:

- 8 experts: attn_output becomes Q5_K in the mixes up to Q4_K_M except Q3_K_L; attn_v and attn_k become Q8_0
  in every mix, Q4_0 and Q6_K too.
- The rule of 70B models follows after the mix's and also holds for Q3_K_S, Q4_K_S and so on: Llama's with
  80 layers and fewer KV heads, Qwen2's and Deci's with 80 layers.
- IQ3_XS and IQ3_XXS give attn_q and attn_k types that need an importance matrix, so they are refused.
- A tensor of one row counts as 1-D.
- Where a row is no whole number of blocks and the type has no fallback (Q4_0 … Q8_0, IQ4_NL, MXFP4, NVFP4,
  Q1_0) llama-quantize stops; here the tensor becomes F16, as it does where a fallback does not fit either.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit.errors import LowbitError, printable
from lowbit.quantize.gguf_blocks import block_weights

# name: the type of a tensor without a rule of its own
MIXES: dict[str, str] = {
    "q4_0": "Q4_0",
    "q4_1": "Q4_1",
    "q5_0": "Q5_0",
    "q5_1": "Q5_1",
    "q8_0": "Q8_0",
    "q2_k": "Q2_K",
    "q3_k_s": "Q3_K",
    "q3_k_m": "Q3_K",
    "q3_k_l": "Q3_K",
    "q4_k_s": "Q4_K",
    "q4_k_m": "Q4_K",
    "q5_k_s": "Q5_K",
    "q5_k_m": "Q5_K",
    "q6_k": "Q6_K",
    "iq3_s": "IQ3_S",
    "iq3_m": "IQ3_S",
    "iq4_nl": "IQ4_NL",
    "iq4_xs": "IQ4_XS",
    "tq1_0": "TQ1_0",
    "tq2_0": "TQ2_0",
    "q1_0": "Q1_0",
    "mxfp4_moe": "MXFP4",
    "nvfp4": "NVFP4",
    "f16": "F16",
    "bf16": "BF16",
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

_NEEDS_MATRIX = "needs an importance matrix, which lowbit does not make"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"),
        _NEEDS_MATRIX,
    ),
    "q2_0": "is written in two layouts (64 or 128 weights a block)",
}

_FALLBACKS = {
    **dict.fromkeys(("IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# Parts of names that llama-quantize leaves as they are: routers, small matrices, tables of positions.
_LEFT_ALONE = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel"),
    *("per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "attn_rel_b.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", ".position_embd", "sam.pos_embd", "sam.neck."),
    *("sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
    *(f"time_mix_{part}.weight" for part in ("first", "decay_w1", "decay_w2", "lerp_fused")),
    *(
        f"time_mix_{part}.weight"
        for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
)
_LEFT_ALONE_WHOLE = ("position_embd.weight", "token_types.weight")

_LAYER = re.compile(r"blk\.(\d+)\.")
# The first part that a name contains decides.
_KINDS = (
    *(("attn_qkv.weight", "value"), ("attn_kv_b.weight", "value"), ("attn_v.weight", "value")),
    *(("attn_k.weight", "key"), ("attn_output.weight", "attention output")),
    *(("ffn_up", "up"), ("ffn_gate", "gate"), ("ffn_down", "down")),
)


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model. ``tied``: the file has no output.weight.

    ``value_layers`` and ``down_layers``: the layers that have an attn_v (attn_qkv, attn_kv_b) and an
    ffn_down, in order; all of them where nothing is given.
    """

    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False
    architecture: str = "llama"
    value_layers: Sequence[int] | None = None
    down_layers: Sequence[int] | None = None

    @property
    def heads_per_kv_head(self) -> int:
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """What llama.cpp calls a 70B model, whose eight query heads share one attn_v."""
        if self.layers != 80:
            return False
        shares = self.architecture == "llama" and self.heads != self.kv_heads and self.experts != 8
        return shares or self.architecture in ("qwen2", "deci")


@dataclass(frozen=True)
class _Place:
    """Where among ``count`` tensors of its kind a tensor is."""

    index: int
    count: int

    def first(self, parts: int) -> bool:
        return self.index < self.count // parts

    def more_bits(self) -> bool:
        eighth = self.count // 8
        return self.index < eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


def mix_name(name: str) -> str:
    """The mix that a user's spelling means; an error where there is none."""
    plain = name.strip().lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain in MIXES:
        return plain
    known = ", ".join(MIXES)
    if plain in REFUSED:
        raise LowbitError("E0402", f"GGUF mix {plain} {REFUSED[plain]}; use one of {known}")
    near = difflib.get_close_matches(plain, (*MIXES, *ALIASES), 1)
    meant = f"; did you mean {near[0]}?" if near else ";"
    raise LowbitError("E0402", f"{printable(name)!r} is no GGUF mix lowbit knows{meant} Known: {known}")


def type_of(mix: str, model: ModelFacts, gguf_name: str, shape: Sequence[int]) -> str | None:
    """The GGUF type of a tensor (…, rows, columns); None where it stays float: norms, routers, 1-D."""
    mix = mix_name(mix)
    if not _is_quantized(gguf_name, shape):
        return None
    base = MIXES[mix]
    if base in ("F16", "BF16"):
        return base
    return _fitting(_wanted(mix, base, model, gguf_name, shape), shape[-1])


def _is_quantized(name: str, shape: Sequence[int]) -> bool:
    dimensions = list(shape)
    while len(dimensions) > 1 and dimensions[0] == 1:
        del dimensions[0]
    if len(dimensions) < 2 or not name.endswith("weight") or name in _LEFT_ALONE_WHOLE:
        return False
    return not any(part in name for part in _LEFT_ALONE)


def _fitting(wanted: str, columns: int) -> str:
    if columns % block_weights(wanted) == 0:
        return wanted
    fallback = _FALLBACKS.get(wanted)
    return fallback if fallback and columns % block_weights(fallback) == 0 else "F16"


def _wanted(mix: str, base: str, model: ModelFacts, name: str, shape: Sequence[int]) -> str:
    """The type before it is known to fit."""
    embedding = name in ("token_embd.weight", "per_layer_token_embd.weight")
    if name == "output.weight" or (model.tied and embedding):
        return _output_type(mix, base, shape[-1])
    if mix == "mxfp4_moe":
        return "MXFP4" if len(shape) > 2 and shape[-3] > 1 else "Q8_0"
    if embedding:
        return "Q4_K" if mix in ("tq1_0", "tq2_0") else base
    kind = next((kind for part, kind in _KINDS if part in name), "")
    if kind == "value":
        return _value_type(mix, base, model, name)
    if kind == "key" and model.experts == 8:
        return "Q8_0"
    if kind == "down":
        return _down_type(mix, base, model, name)
    if kind == "attention output":
        return _attention_output_type(mix, base, model)
    return base


def _output_type(mix: str, base: str, columns: int) -> str:
    if mix == "mxfp4_moe" or base == "Q8_0" or columns % block_weights(base):
        return "Q8_0"
    return "Q6_K"


def _place(name: str, layers: Sequence[int] | None, count: int) -> _Place:
    found = _LAYER.match(name)
    layer = int(found[1]) if found else 0
    return _Place(layer if layers is None else list(layers).index(layer), count)


_VALUE_RULES: dict[str, Callable[[_Place, bool], str | None]] = {  # of the place, and of many heads a KV head
    "q2_k": lambda place, many: "Q4_K" if many else "Q3_K",
    "q3_k_m": lambda place, many: "Q5_K" if place.index < 2 else "Q4_K",
    "q3_k_l": lambda place, many: "Q5_K",
    "iq3_s": lambda place, many: "Q4_K" if many else None,
    "iq3_m": lambda place, many: "Q4_K",
    "iq4_nl": lambda place, many: "Q5_K" if many else None,
    "iq4_xs": lambda place, many: "Q5_K" if many else None,
    "q4_k_m": lambda place, many: "Q6_K" if place.more_bits() else None,
    "q5_k_m": lambda place, many: "Q6_K" if place.more_bits() else None,
    "q4_k_s": lambda place, many: "Q5_K" if place.index < 4 else None,
}


def _value_type(mix: str, base: str, model: ModelFacts, name: str) -> str:
    if model.experts == 8:
        return "Q8_0"
    count = model.layers if model.value_layers is None else len(model.value_layers)
    rule = _VALUE_RULES.get(mix)
    many = model.heads_per_kv_head >= 4
    wanted = (rule and rule(_place(name, model.value_layers, count), many)) or base
    return "Q5_K" if model.is_70b and wanted in ("Q3_K", "Q4_K") else wanted


_DOWN_RULES: dict[str, Callable[[_Place], str | None]] = {
    "q2_k": lambda place: "Q3_K",
    "q3_k_m": lambda place: "Q5_K" if place.first(16) else "Q4_K",
    "q3_k_l": lambda place: "Q5_K",
    "q4_k_s": lambda place: "Q5_K" if place.first(8) else None,
    "q4_k_m": lambda place: "Q6_K" if place.more_bits() else None,
    "q5_k_m": lambda place: "Q6_K" if place.more_bits() else None,
    "iq4_nl": lambda place: "Q5_K" if place.first(8) else None,
    "iq4_xs": lambda place: "Q5_K" if place.first(8) else None,
}


def _down_type(mix: str, base: str, model: ModelFacts, name: str) -> str:
    place = _place(name, None if model.experts > 1 else model.down_layers, model.layers)
    if mix == "iq3_m":
        return "Q4_K" if place.first(8) or (model.experts == 8 and place.more_bits()) else base
    rule = _DOWN_RULES.get(mix)
    return (rule and rule(place)) or base


_EIGHT_EXPERT_OUTPUT = {
    *("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs")
}


def _attention_output_type(mix: str, base: str, model: ModelFacts) -> str:
    if model.experts == 8:
        return "Q5_K" if mix in _EIGHT_EXPERT_OUTPUT else base
    return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K", "iq3_m": "Q4_K"}.get(mix, base)
