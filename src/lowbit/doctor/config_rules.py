"""Rules that need config.json and the tensors' names only, tried before the model is surveyed.

Their corrections are applied to the header at once: the survey then finds what is wrong beside them.
"""

from __future__ import annotations

import re

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.doctor.correction import Correction
from lowbit.doctor.rules import Report
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes
from lowbit.formats.dense import Dense
from lowbit.formats.quantization_config import quantization_config
from lowbit.models.registry import MODULES

_EMBEDDING = re.compile(r"(?:(.*)\.)?embed_tokens\.(?:weight|qweight|weight_packed)")
_HEAD = re.compile(r"(?:.*\.)?lm_head\.([^.]+)")
_ANY_HEAD = re.compile(r"(?:(?:.*\.)?lm_head|embed_out|output)\.[^.]+")  # other families' names for it too
# Prefixes lowbit looks for (``loading.names``); the others are left by trainers and mergers.
_KNOWN = ("model.language_model", "language_model.model", "language_model", None)
_FLOATS = ("F64", "F32", "F16", "BF16")
# What any quantized checkpoint has, besides the dtypes that no plain float has.
_QUANTIZED = re.compile(
    r"\.(qweight|B|weight_packed|weight_scale(_inv|_2)?|SCB|weight\.absmax|weight\.quant_map|scales|biases|W_q|"
    r"trellis|q_invperm|Qidxs|codebooks|weight\._data|bitmask|compressed)$|_(blocks|scales?|scale_inv)$"
)


def check_prefix(header: CheckpointHeader, report: Report, correction: Correction) -> None:
    """D112, D113: names under another prefix than the architecture's ``model.``."""
    if header.container == "gguf" or not _is_built_in(header):
        return
    found = {match[1] for name in header.tensors if (match := _EMBEDDING.fullmatch(name))}
    if len(found) != 1 or found == {"model"}:
        return
    [prefix] = found
    renames = _renames(header, prefix)
    certain = len(renames) == len(header.tensors) and len(set(renames.values())) == len(renames)
    certain = certain and "model.norm.weight" in renames.values() and not _mentions(header, prefix)
    shown, what = printable(f"{prefix}." if prefix else ""), "tensors renamed to 'model.…' and 'lm_head.…'"
    first = next(name for name in header.tensors if _EMBEDDING.fullmatch(name))
    rule, so = ("D112", "lowbit reads them so") if prefix in _KNOWN else ("D113", "nothing reads them so")
    report.add(
        rule,
        f"{header.file_of(first)}: tensor names begin with {shown!r} ({printable(first)!r}), the "
        f"architecture's with 'model.'; {so}",
        file=header.file_of(first),
        tensor=first,
        fix=what if certain else "",
    )
    if certain:
        correction.renames = {old: new for old, new in renames.items() if old != new}


def _is_built_in(header: CheckpointHeader) -> bool:
    listed = header.config.get("architectures")
    return isinstance(listed, list) and bool(listed) and listed[0] in MODULES


def _renames(header: CheckpointHeader, prefix: str | None) -> dict[str, str]:
    """Stored name -> usual name, for every tensor that has one."""
    renames = {}
    start = f"{prefix}." if prefix else ""
    for name in header.tensors:
        if match := _HEAD.fullmatch(name):
            renames[name] = f"lm_head.{match[1]}"
        elif name.startswith(start):
            renames[name] = f"model.{name.removeprefix(start)}"
    return renames


def _mentions(header: CheckpointHeader, prefix: str | None) -> bool:
    """Whether something names modules by the prefix, so that renaming alone would break it: the quantization
    config, or the files' ``__metadata__`` (torchao describes each weight there by name)."""
    if any("." in key for key in header.metadata):
        return True
    found = quantization_config(header)
    return found is not None and prefix is not None and f"{prefix}." in repr(found.values)


def check_quantization(header: CheckpointHeader, report: Report, correction: Correction) -> None:
    """D110, D111: a quantization config without quantized tensors, and the reverse."""
    if header.container == "gguf":
        return
    found = quantization_config(header)
    if found is None and Dense.claims(header):
        try:
            Dense(header, Notes())
        except LowbitError as error:
            report.add_error(error, "D111")
    if found is None:
        return
    floats = all(entry.dtype in _FLOATS for entry in header.tensors.values())
    if not header.tensors or not floats or any(_QUANTIZED.search(name) for name in header.tensors):
        return
    if not _asks_for_quantized(found.values):
        return
    example = next(iter(header.tensors.values()))
    report.add(
        "D110",
        f"{found.place} says {printable(found.method)}, but all {len(header.tensors)} tensors are plain "
        f"floats ({printable(example.name)!r} is {example.dtype}); the model was dequantized",
        file=found.place.split(":")[0],
        tensor=example.name,
        fix=f"{found.place} removed",
    )
    correction.drop_quantization = True


def _asks_for_quantized(values: dict[str, object]) -> bool:
    """Not so where a compressed-tensors config has no groups, or only turns activations, or a config says
    that the weights are plain."""
    groups = values.get("config_groups")
    if groups is None and values.get("transform_config"):
        return False
    if groups == {} or (groups is not None and values.get("format") == "dense"):
        return False
    return values.get("packing_format") != "auto_round:fake" and values.get("quantization_mode") != "online"


def check_dtype(header: CheckpointHeader, report: Report) -> None:
    """D119."""
    if header.container == "gguf" or header.config.get("dtype") or header.config.get("torch_dtype"):
        return
    nested = [value for value in header.config.values() if isinstance(value, dict)]
    if not any(value.get("dtype") or value.get("torch_dtype") for value in nested):
        report.add(
            "D119",
            "config.json has neither dtype nor torch_dtype; add the type of the unquantized tensors, e.g. "
            '"dtype": "bfloat16"',
            file="config.json",
        )


def check_head(header: CheckpointHeader, tied: bool, report: Report, correction: Correction) -> None:
    """D114: no output head though the config does not tie it. (D115, D116 need the data.)"""
    if header.container == "gguf" or tied or any(_ANY_HEAD.fullmatch(name) for name in header.tensors):
        return
    absent = header.config.get("tie_word_embeddings") is None
    told = "does not have the key tie_word_embeddings" if absent else "says tie_word_embeddings false"
    report.add(
        "D114",
        f"{header.root.name}: no file contains 'lm_head.weight', and config.json {told}"
        + ("" if absent else "; a shard with it may be missing"),
        tensor="lm_head.weight",
        fix="tie_word_embeddings set to true in config.json" if absent else "",
    )
    if absent:
        correction.config["tie_word_embeddings"] = True
