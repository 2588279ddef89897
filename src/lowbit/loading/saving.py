"""save_checkpoint: a model's modules, one after another, as a Hugging Face folder in some format.

    model.safetensors | model-00001-of-….safetensors and its index
    config.json                with the format's quantization_config, written last
    tokenizer, generation config, chat template      copied; from GGUF built from its metadata

One module is in memory at a time. The folder appears complete or not at all (``output_folder``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint.file_checks import check_regular_file
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.output_folder import check_room, explained, output_folder
from lowbit.checkpoint.safetensors_writer import SHARD_BYTES, ShardedWriter, write_file
from lowbit.checkpoint.tensor_data import DTYPES
from lowbit.formats.writing import CheckpointWriter
from lowbit.loading.source_modules import ReadModule
from lowbit.numerics.scheme import Scheme
from lowbit.tokenization.exported import tokenizer_documents

Progress = Callable[[int, int, str], None]
Json = dict[str, object]

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_QUANTIZATION_FILES = frozenset(
    (
        *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"),
        *("quanto_qmap.json", "quantization_map.json"),
    )
)
_DOCUMENTS = frozenset((".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm"))
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_DOCUMENT_BYTES = 256 << 20


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that belongs to no module: a norm's weight."""

    name: str
    tensor: Tensor


def save_checkpoint(
    out: Path,
    source: CheckpointHeader,
    config: Json,
    parts: Iterable[ReadModule | NamedTensor],
    writer: CheckpointWriter,
    *,
    nbytes: int,
    tensors: int = 0,
    dtype: str | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``parts`` in the writer's format to the folder ``out``.

    ``config``: config.json without its quantization. ``nbytes``: about what the weights will take; the disk
    is asked for it before anything is written. ``tensors``: about how many there are. ``dtype`` (bf16, f16,
    f32): what config.json says the plain numbers are; None leaves what it says. ``force``: replace ``out``.
    """
    with output_folder(out, force=force, source=source.root) as folder:
        check_room(out, int(nbytes * 1.02) + (16 << 20))
        room = ShardedWriter.room_for(max(tensors, 16), 96 + writer.described // 4)
        shards = ShardedWriter(folder, shard_bytes, room, writer.metadata())
        try:
            for part in parts:
                _write_part(shards, writer, part)
            with explained(out):
                shards.finish()
        finally:
            shards.close()
        documents = _documents(source, config)
        found = writer.quantization_config()
        for name in () if found is None else writer.config_files:
            documents[name] = _text(found)
        for name, text in documents.items():
            write_file(folder / name, text)
        said: Json = {}
        said.update(dict.fromkeys(() if found is None else writer.config_keys, found))
        write_file(folder / "config.json", _text(written_config(config, said, dtype)))


def _write_part(shards: ShardedWriter, writer: CheckpointWriter, part: ReadModule | NamedTensor) -> None:
    if isinstance(part, NamedTensor):
        shards.add(part.name, DTYPE_NAMES[part.tensor.dtype], tuple(part.tensor.shape), as_bytes(part.tensor))
        return
    target = part.target
    shards.describe(writer.description(target))
    for name, tensor in writer.write(target, part.weight, part.bias, part.input).items():
        dtype, shape, data = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor)
        if target.expert is None:
            shards.add(name, dtype, shape, data)
        else:
            shards.add_slice(name, dtype, shape, target.expert, target.experts, data)


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major; copied only where they do not lie so."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def written_config(config: Json, quantization: Json, dtype: str | None) -> Json:
    """config.json of the new folder; ``quantization``: all that says how it is quantized."""
    made = {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
    for key, value in made.items():
        if isinstance(value, dict) and any(name in value for name in _QUANTIZATION_KEYS):
            made[key] = {name: inner for name, inner in value.items() if name not in _QUANTIZATION_KEYS}
    if dtype is not None:
        # transformers 5 calls it dtype and reads both; what is there keeps its name.
        for key in [key for key in ("dtype", "torch_dtype") if key in made] or ["torch_dtype"]:
            made[key] = _TORCH_NAMES[dtype]
    return made | quantization


def _documents(source: CheckpointHeader, config: Json) -> dict[str, bytes]:
    """The small files beside the weights; no code, no other weights, no quantization of the source's."""
    if source.container == "gguf":
        length = config.get("max_position_embeddings")
        texts = tokenizer_documents(source, length if isinstance(length, int) else 1 << 20)
        return {name: text.encode() for name, text in texts.items()}
    found = {}
    for path in sorted(source.root.iterdir()):
        wanted = path.suffix in _DOCUMENTS or path.name.upper().startswith(_LICENCES)
        skipped = path.name == "config.json" or path.name in _QUANTIZATION_FILES
        if not wanted or skipped or path.name.endswith(".index.json") or not path.is_file():
            continue
        if check_regular_file(path) <= _DOCUMENT_BYTES:
            found[path.name] = path.read_bytes()
    return found


def _text(values: object) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def planned_nbytes(schemes: Iterable[tuple[Scheme, tuple[int, ...]]]) -> int:
    """About the bytes of modules of these schemes and shapes, codes packed."""
    total = 0.0
    for scheme, shape in schemes:
        weights = 1
        for size in shape:
            weights *= size
        total += weights * scheme.bits_per_weight(shape) / 8
    return int(total)
