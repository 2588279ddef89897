"""Where a checkpoint says how it is quantized, in the order the field agrees on."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError

_NESTED = ("text_config", "llm_config", "language_config", "language_model_config")


@dataclass(frozen=True)
class QuantizationConfig:
    """``method``: the quant_method, or what its absence means there. ``place``: the file, for messages."""

    method: str
    values: dict[str, object]
    place: str


def quantization_config(header: CheckpointHeader) -> QuantizationConfig | None:
    """The checkpoint's own word on its quantization, or None where it has none."""
    if header.container == "gguf":
        return None
    config = header.config
    for holder in (config, *(config[name] for name in _NESTED if isinstance(config.get(name), dict))):
        assert isinstance(holder, dict), "filtered above"
        found = holder.get("quantization_config")
        if found is not None:
            # mlx-lm writes its own key and a copy under this one; neither names a method, its files do.
            by_mlx = isinstance(holder.get("quantization"), dict) or header.metadata.get("format") == "mlx"
            mlx = "mlx" if by_mlx else ""
            return _checked(found, "config.json: quantization_config", mlx)
    if config.get("compression_config") is not None:
        return _checked(config["compression_config"], "config.json: compression_config", "compressed-tensors")
    if config.get("quip_params") is not None:
        return _checked(config["quip_params"], "config.json: quip_params", "quip_sharp")
    for name, method in (
        ("hf_quant_config.json", "modelopt"),
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("quantization_config.json", "auto-round"),
        ("quanto_qmap.json", "quanto"),
        ("quantization_map.json", "quanto"),
    ):
        values = read_json(header, name)
        if values is not None:
            # QServe's and SqueezeLLM's own files of that name say wbits, AutoAWQ's w_bit.
            if method == "awq" and "wbits" in values:
                tables = any(tensor.endswith(".lookup_table") for tensor in header.tensors)
                method = "squeezellm" if tables else "qoq"
            return _checked(values, name, "w4afp8" if _is_w4afp8(values) else method)
    if isinstance(config.get("quantization"), dict):
        return _checked(config["quantization"], "config.json: quantization", "mlx")
    return None


def _is_w4afp8(values: dict[str, object]) -> bool:
    """TensorRT-LLM's W4AFP8: hf_quant_config.json says MIXED_PRECISION, and of what in no word.

    ModelOpt's own mixtures name the algorithm of every layer.
    """
    inner = values.get("quantization")
    return (
        isinstance(inner, dict)
        and inner.get("quant_algo") == "MIXED_PRECISION"
        and not inner.get("quantized_layers")
    )


def _checked(found: object, place: str, method: str = "") -> QuantizationConfig:
    if not isinstance(found, dict):
        raise LowbitError("E0212", f"{place} must be an object, found {type(found).__name__}")
    told = found.get("quant_method")
    if told is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        told = "bitsandbytes"  # files of 2023 name no method
    if told is None and found.get("backend") == "sinq":
        told = "sinq"
    name = told if isinstance(told, str) and told else method
    if not name:
        raise LowbitError("E0212", f"{place} names no quant_method; it cannot be told what the weights are")
    return QuantizationConfig(name, found, place)


def claimed_config(header: CheckpointHeader) -> QuantizationConfig:
    """The word a format has claimed the checkpoint by."""
    found = quantization_config(header)
    assert found is not None, "claims() saw it"
    return found


def says_method(header: CheckpointHeader, *names: str) -> str | None:
    """What a format claims a checkpoint by: where it says one of its ``names``; None where it does not."""
    found = quantization_config(header)
    if found is None or found.method.lower() not in names:
        return None
    return f"{found.place} says {found.method}"


def claimed_by_tensors(header: CheckpointHeader, suffix: str | tuple[str, ...], *names: str) -> str | None:
    """What a format claims a checkpoint by whose config names it, or that has no config and its tensors."""
    if header.container == "gguf":
        return None
    if quantization_config(header) is not None:
        return says_method(header, *names)
    shown = next((tensor for tensor in header.tensors if tensor.endswith(suffix)), None)
    return None if shown is None else f"tensor {shown!r}"
