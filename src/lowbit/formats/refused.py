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
_BITBLAS = (
    "stores what a compiler laid out for one GPU (BitBLAS); use the GPTQ version it was made from, or "
    "re-export it with GPTQModel as format gptq"
)
_ONLINE = (
    "is a way of quantizing at load, not a form of checkpoint; remove quantization_config from config.json"
)
_VENDOR = "is a vendor's layout; use the original model or a GPTQ, AWQ or GGUF version"


def _written(method: str) -> str:
    return f"is how another engine runs {method} checkpoints; config.json should say quant_method {method}"


REFUSED: dict[str, str] = {
    "gemma": _LATER,
    "bitblas": _BITBLAS,
    "gptq_bitblas": _BITBLAS,
    "nvfp4": "is transformers' way of quantizing at load, which it does not save; remove quantization_config "
    "from config.json and serve with --quantization nvfp4, or use a ModelOpt or compressed-tensors version",
    "petit_nvfp4": _PRIVATE,
    "modelslim": _VENDOR,
    "humming": _VENDOR,
    "turbomind": _VENDOR,
    "mxfp_w4a8": _VENDOR,
    "smooth_quant": "is LMDeploy's W8A8, whose layout has not been verified; use a compressed-tensors W8A8 "
    "version",
    "smoothquant": "says nothing of how weights are stored; use a compressed-tensors W8A8 version",
    "bitnet_bitblas": "stores what a compiler laid out for one GPU (BitBLAS); use the bitnet version it was "
    "made from",
    "auto_gptq": _written("gptq"),
    "gptq_v2": _written("gptq"),
    "cpu_gptq": _written("gptq"),
    "exllama": _written("gptq"),
    "exllamav2": _written("gptq"),
    "auto_awq": _written("awq"),
    "cpu_awq": _written("awq"),
    "awq_triton": _written("awq"),
    "llm-awq": _written("awq"),
    "moe_wna16": "is how another engine runs mixtures of gptq or awq; config.json should say which",
    "hqq_marlin": _written("hqq"),
    "ptpc_fp8": _written("fp8"),
    "deepgemm_fp8": _written("fp8"),
    "deepseek_v4_fp8": _written("fp8"),
    "auto-round-int8": _written("auto-round"),
    "autoround": _written("auto-round"),
    "quip": "is QuIP-for-all's, whose padded codes are not decoded here; use a GPTQ, AWQ or GGUF version",
    "deepspeedfp": _ONLINE,
    "tpu_int8": _ONLINE,
    "experts_int8": _ONLINE,
    "ipex": _ONLINE,
    "neuron_quant": _ONLINE,
    **dict.fromkeys(
        (
            *("rtn", "quant_llm", "online", "unquant", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel"),
            *("int8_per_channel_weight_only", "nvfp4_per_token", "nvfp4_online", "quark_int4fp8_moe"),
            *("quark_mxfp4", "mlx_q4", "mlx_q8"),
        ),
        _ONLINE,
    ),
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
    ".s_channel": "qqq",
    ".lookup_table": "squeezellm",
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
