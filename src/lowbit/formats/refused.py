"""Methods that exist and are not read here: each refused by name, with what to do instead.

``refuse`` speaks when no format claims a checkpoint.
"""

from __future__ import annotations

from typing import NoReturn

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.formats.quantization_config import quantization_config

_LATER = "is not read yet; use a GPTQ, AWQ, FP8, compressed-tensors, bitsandbytes or GGUF version"
_PRIVATE = "stores one GPU kernel's private layout; use the GPTQ, AWQ or FP8 version it was made from"
_ONLINE = (
    "is a way of quantizing at load, not a form of checkpoint; remove quantization_config from config.json"
)

REFUSED: dict[str, str] = {
    "gemma": _LATER,
    "qqq": _PRIVATE,
    "bitblas": _PRIVATE,
    "gptq_bitblas": _PRIVATE,
    "nvfp4": "stores swizzled scales; use the ModelOpt or compressed-tensors version",
    "petit_nvfp4": _PRIVATE,
    "modelslim": "is a vendor's layout; use the original model or a GPTQ, AWQ or GGUF version",
    "humming": "is a vendor's layout; use the original model or a GPTQ, AWQ or GGUF version",
    "quip": "is QuIP-for-all's, whose padded codes are not decoded here; use a GPTQ, AWQ or GGUF version",
    "higgs": "stores codes in FLUTE's order, which depends on the GPU they were packed for; use a GPTQ, AWQ "
    "or GGUF version",
    "deepspeedfp": _ONLINE,
    "tpu_int8": _ONLINE,
    "experts_int8": _ONLINE,
    "ipex": _ONLINE,
    "neuron_quant": _ONLINE,
}
# A method that no config names, by the tensors only it writes (quanto is read by them).
_SUFFIXES = {
    ".trellis": "exl3",
    ".q_invperm": "exl2",
    ".Qidxs": "quip_sharp",
    ".codebooks": "aqlm",
    ".dense_weights": "spqr",
    ".centroids.weight": "vptq",
    ".s1_scales": "qoq",
    "._data": "quanto",
    ".quantized_weight_values": "fouroversix",
}


def refuse(header: CheckpointHeader) -> NoReturn:
    """E0211 with the method's name and the way out."""
    found = quantization_config(header)
    method, place = (found.method, found.place) if found else refused_by_tensors(header) or ("", "")
    name = method.lower().replace("_", "-") if method else ""
    for known, advice in REFUSED.items():
        if known.replace("_", "-") == name:
            raise LowbitError("E0211", f"{header.root.name}: quantization method {known} ({place}) {advice}")
    if found is None and name:
        raise LowbitError(
            "E0211",
            f"{header.root.name}: the weights are {method}'s ({place}), but config.json says nothing of "
            "how they are quantized; restore the quantization config that belongs to these weights",
        )
    from lowbit.formats import all_formats

    listed = ", ".join(sorted(fmt.name for fmt in all_formats()))
    raise LowbitError(
        "E0211",
        f"{header.root.name}: quantization method {printable(repr(method))} ({place}) is unknown; "
        f"known: {listed}",
    )


def refused_by_tensors(header: CheckpointHeader) -> tuple[str, str] | None:
    """(method, the tensor that shows it) of a checkpoint whose config says nothing."""
    # HQQ's own file has no config beside it; safetensors with these tensors have lost theirs.
    suffixes = _SUFFIXES | ({".W_q": "hqq"} if header.container == "pickle" else {})
    for name in header.tensors:
        for suffix, method in suffixes.items():
            if name.endswith(suffix):
                return method, f"by tensor {printable(repr(name))}"
    return None
