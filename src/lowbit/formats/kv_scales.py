"""Scales of a quantized KV cache: K and V are stored as ``x / scale`` in e4m3.

They come with the checkpoint, under the spelling of whichever tool calibrated them, or in a JSON file
(``--quantization-param-path``):

    {"model_type": "llama",
     "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.023, "1": 0.0185}}}}

where the outer key is the tensor-parallel rank, the inner one the layer, and the value one scale for K and V
or ``{"k": 0.02, "v": 0.03}``. One scale of the two stands for both; a negative one means there is none. A
layer without scales gets each token's own (numerics/cache_format.py), never 1; so does one with a scale for
each head, (heads, 1, 1) of compressed-tensors' ``attn_head``: a cache has one for all heads, or finer ones.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Protocol

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats.quantization_config import quantization_config

_log = logging.getLogger("lowbit")

# After the attention's name; the first that is there counts.
_K = ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "attn.k_scale", "qkv_proj.k_scale")
_V = ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "attn.v_scale", "qkv_proj.v_scale")
_BOTH = ("kv_scale", "attn.kv_scale")
# Queries and softmax weights are not quantized here: their scales have no use.
_UNUSED = (
    *("q_scale", "q_proj.q_scale", "q_proj.output_scale", "attn.q_scale"),
    *("prob_scale", "prob_output_scale", "attn.prob_scale"),
)
_REFUSED = ("k_zero_point", "v_zero_point", "k_proj.k_bias", "v_proj.v_bias")


class Finder(Protocol):
    """Tells the stored name of the first of some tensors that is there."""

    def find(self, *canonical: str) -> str | None: ...


class KvScales:
    """The scales of one checkpoint, or of a file that stands in for them."""

    def __init__(self, header: CheckpointHeader, table: dict[int, tuple[float, float]] | None = None) -> None:
        self.header = header
        self.table = table
        self._said_heads = False

    def find(self, names: Finder, attention: str) -> tuple[str | None, str | None]:
        """The tensors of K's and V's scale of one layer, marked as used."""
        refused = names.find(*(f"{attention}.{suffix}" for suffix in _REFUSED))
        if refused is not None:
            raise LowbitError(
                "E0218",
                f"{self.header.file_of(refused)}: tensor {refused!r} asks for a KV cache with zero points, "
                "which is not supported; use an export with a symmetric fp8 KV cache",
            )
        for suffix in _UNUSED:
            names.find(f"{attention}.{suffix}")
        if names.find(f"{attention}.k_proj.weight._scale") is not None:
            return None, None  # quanto's: every layer has an output_scale, 1 where nothing was calibrated
        both = names.find(*(f"{attention}.{suffix}" for suffix in _BOTH))
        k = names.find(*(f"{attention}.{suffix}" for suffix in _K)) or both
        v = names.find(*(f"{attention}.{suffix}" for suffix in _V)) or both
        if any(name is not None and self._is_of_heads(name) for name in (k, v)):
            if not self._said_heads:
                self._said_heads = True
                _log.warning("lowbit: the checkpoint has KV scales for each head; each token's own are used")
            return None, None
        return k or v, v or k

    def _is_of_heads(self, name: str) -> bool:
        shape = self.header.tensors[name].shape
        return len(shape) == 3 and shape[1:] == (1, 1)

    def of_layer(
        self, names: Finder, attention: str, layer: int, data: TensorData
    ) -> tuple[float, float] | None:
        """(k_scale, v_scale) of a layer, or None where nothing says them."""
        k, v = self.find(names, attention)
        if self.table is not None:
            return self.table[layer]
        found = [self._value(name, data) for name in (k, v)]
        known = [value for value in found if value is not None]
        if not known:
            return None
        first, second = found[0] or known[0], found[1] or known[-1]
        return first, second

    def _value(self, name: str | None, data: TensorData) -> float | None:
        if name is None:
            return None
        entry = self.header.tensors[name]
        if math.prod(entry.shape) != 1 or entry.dtype not in ("F32", "F16", "BF16"):
            raise LowbitError(
                "E0218",
                f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; only one scale a "
                "layer is supported for the KV cache",
            )
        value = float(data.tensor(name).float())
        if value < 0:
            return None  # the writers' mark of a scale that was never calibrated
        if not math.isfinite(value) or value == 0:
            raise LowbitError(
                "E0215", f"{entry.file.name}: tensor {name!r} is {value}; a KV scale is a positive number"
            )
        return value


def wants_fp8_cache(header: CheckpointHeader) -> bool:
    """Whether the checkpoint was calibrated for an e4m3 KV cache (``kv_cache_scheme``, ModelOpt's keys).

    In files of llm-compressor from before November 2024 the key is a level deeper; AutoFP8 says "static".
    """
    found = quantization_config(header)
    if found is None:
        return False
    nested = found.values.get("quantization_config")
    values = nested if isinstance(nested, dict) else found.values
    inner = values.get("quantization")
    algorithm = (inner if isinstance(inner, dict) else values).get("kv_cache_quant_algo")
    scheme = values.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return scheme.get("type", "float") == "float" and scheme.get("num_bits") == 8
    return "FP8" in (algorithm, scheme) or (found.method == "fp8" and scheme == "static")


def read_scales_file(path: Path, header: CheckpointHeader, layers: int) -> KvScales:
    """The scales of ``--quantization-param-path``; any doubt is E0216 naming the key."""

    def fail(what: str) -> LowbitError:
        return LowbitError("E0216", f"{path.name}: {what}")

    if not path.is_file():
        raise LowbitError("E0301", f"{printable(str(path))}: no such file (--quantization-param-path)")
    found = read_json(path.parent, path.name) or {}
    told, model_type = found.get("model_type"), header.config.get("model_type")
    if told is not None and model_type is not None and told != model_type:
        raise fail(f"model_type is {printable(repr(told))}, the model's is {printable(repr(model_type))}")
    cache = found.get("kv_cache")
    if not isinstance(cache, dict) or cache.get("dtype") != "float8_e4m3fn":
        raise fail("kv_cache.dtype must be 'float8_e4m3fn'")
    ranks = cache.get("scaling_factor")
    if not isinstance(ranks, dict) or len(ranks) != 1 or not isinstance(ranks.get("0"), dict):
        raise fail("kv_cache.scaling_factor must have the one rank '0'")
    table = {}
    for layer in range(layers):
        value = ranks["0"].get(str(layer))
        pair = (value.get("k"), value.get("v")) if isinstance(value, dict) else (value, value)
        numbers = [n for n in pair if isinstance(n, int | float) and math.isfinite(n) and n > 0]
        if len(numbers) != 2:
            raise fail(f"layer {layer} of {layers} has no positive scale")
        table[layer] = (float(numbers[0]), float(numbers[1]))
    return KvScales(header, table)
