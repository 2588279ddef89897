"""save_checkpoint: a model's modules, one after another, as a Hugging Face folder in some format.

    model.safetensors | model-00001-of-….safetensors and its index
    config.json                with the format's quantization_config, written last
    tokenizer, generation config, chat template      copied; from GGUF built from its metadata
    README.md, LICENSE, NOTICE, preprocessor files   copied

One module is in memory at a time. The folder appears complete or not at all (``output_folder``); with a
``Journal`` a run that was broken off goes on after its last finished shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint.file_checks import check_regular_file
from lowbit.checkpoint.hashes import CERTIFICATE
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.hub import FOR_PEOPLE
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.output_folder import check_room, explained, output_folder
from lowbit.checkpoint.quality import NAME as QUALITY
from lowbit.checkpoint.safetensors_writer import SHARD_BYTES, ShardedWriter, write_file
from lowbit.checkpoint.tensor_data import DTYPES
from lowbit.errors import printable
from lowbit.formats.writing import CheckpointWriter
from lowbit.loading.source_modules import ReadModule, SourceModel
from lowbit.numerics.scheme import Scheme
from lowbit.tokenization.chat_template import TOOL_TEMPLATE
from lowbit.tokenization.exported import tokenizer_documents

Progress = Callable[[int, int, str], None]
Json = dict[str, object]

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization", "quip_params")
_QUANTIZATION_FILES = frozenset(
    (
        *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"),
        *("quanto_qmap.json", "quantization_map.json", "model.safetensors.index.json.meta.json"),
        CERTIFICATE,
    )
)
# Of weights that are not copied: the authors' layout, and an adapter for these.
_OF_OTHER_WEIGHTS = frozenset(("params.json", "adapter_config.json"))
_DOCUMENTS = frozenset((".json", ".jinja", ".txt", ".model", ".v3", ".tiktoken", ".spm"))
_OF_TOKENIZER = frozenset(
    (
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "tekken.json", "tokenizer.model.v3"),
        *("chat_template.jinja", "chat_template.json", TOOL_TEMPLATE),
    )
)
_NEVER = frozenset(
    (
        *(".py", ".pyc", ".ipynb", ".sh", ".so", ".dll", ".exe"),  # code
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".onnx", ".msgpack", ".gguf"),
        *(".npz", ".tar", ".gz", ".zip"),
    )
)
_DOCUMENT_BYTES = 256 << 20
_SAMPLE = 4096


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that belongs to no module: a norm's weight."""

    name: str
    tensor: Tensor


Part = ReadModule | NamedTensor
# Of the names of parts that need not come, all others in order.
Parts = Callable[[Collection[str]], Iterable[Part]]


def save_checkpoint(
    out: Path,
    source: CheckpointHeader,
    config: Json,
    parts: Parts,
    writer: CheckpointWriter,
    *,
    nbytes: int,
    tensors: int = 0,
    dtype: str | None = None,
    tokenizer: CheckpointHeader | None = None,
    as_measured: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    journal: Journal | None = None,
    check: Callable[[Path, Mapping[str, Json]], None] | None = None,
) -> None:
    """Write ``parts`` in the writer's format to the folder ``out``.

    ``config``: config.json without its quantization. ``nbytes``: about what the weights will take; the disk
    is asked for it before anything is written. ``tensors``: about how many there are. ``dtype`` (bf16, f16,
    f32): what config.json says the plain numbers are; None leaves what it says. ``tokenizer``: whose is
    copied, if not the source's. ``as_measured``: the model computes what the source does, so that what was
    measured of it (quality.json) still holds. ``force``: replace ``out``.
    ``check``: called with the complete folder, before it gets its name, and what is told of each part.
    """
    with output_folder(out, force=force, source=source.root, journal=journal) as folder:
        finished = [] if journal is None else journal.lines
        kept = sum(line.nbytes for line in finished)
        check_room(out, max(0, int(nbytes * 1.02) - kept) + (16 << 20))
        room = ShardedWriter.room_for(max(tensors, 16), 96 + writer.described // 4)
        shards = ShardedWriter(folder, shard_bytes, room, writer.metadata())
        told: dict[str, Json] = {}
        if journal is not None:
            shards.take_over(line.name for line in finished)
            told |= journal.parts
            writer.learned |= finished[-1].learned if finished else {}
        where: dict[str, int] = {}  # of parts the journal does not know: the last shard they reach into

        def on_finished(number: int, shard: Path) -> None:
            whole = [name for name, last in where.items() if last <= number]
            if journal is not None:
                journal.add(shard, {name: told[name] for name in whole}, writer.learned)
            for name in whole:
                del where[name]

        shards.on_finished = on_finished
        try:
            for part in parts(frozenset(told)):
                name = part.name if isinstance(part, NamedTensor) else part.target.name
                written = _write_part(shards, writer, part)
                told[name] = part.told if isinstance(part, ReadModule) else {}
                where[name] = max(shards.shard_of(tensor) for tensor in written)
            with explained(out):
                shards.finish()
        finally:
            shards.close()
        documents = _documents(source, config, tokenizer)
        if not as_measured:
            documents.pop(QUALITY, None)
        found = writer.quantization_config()
        for name in () if found is None else writer.config_files:
            documents[name] = _text(writer.file_config(name))
        for name, text in documents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, text)
        said: Json = {}
        said.update(dict.fromkeys(() if found is None else writer.config_keys, found))
        write_file(folder / "config.json", _text(written_config(config, said, dtype)))
        if check is not None:
            check(folder, told)


def digest_of(header: CheckpointHeader) -> str:
    """Of config, tensors' names, places and first bytes, and the files' sizes and times."""
    digest = hashlib.sha256(repr(sorted(header.config.items(), key=str)).encode())
    files = {}
    for name in sorted(header.tensors):
        entry = header.tensors[name]
        files[entry.file] = entry.file.stat()
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.file.name} {entry.start}".encode())
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            digest.update(file.read(min(_SAMPLE, entry.nbytes)))
    for path, stat in sorted(files.items()):
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _write_part(shards: ShardedWriter, writer: CheckpointWriter, part: Part) -> list[str]:
    """The names of its tensors."""
    if isinstance(part, NamedTensor):
        shards.add(part.name, DTYPE_NAMES[part.tensor.dtype], tuple(part.tensor.shape), as_bytes(part.tensor))
        return [part.name]
    target = part.target
    shards.describe(writer.description(target))
    tensors = writer.write(target, part.weight, part.bias, part.input)
    for name, tensor in tensors.items():
        dtype, shape, data = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor)
        if target.expert is None:
            shards.add(name, dtype, shape, data)
        else:
            shards.add_slice(name, dtype, shape, target.expert, target.experts, data)
    return list(tensors)


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


def _documents(
    source: CheckpointHeader, config: Json, tokenizer: CheckpointHeader | None = None
) -> dict[str, bytes]:
    """The small files beside the weights; no code, no other weights, no quantization of the source's.

    ``tokenizer``: the checkpoint those of the tokenizer are taken from, the source if None.
    """
    if tokenizer is not None:
        own = {} if source.container == "gguf" else _documents(source, config)
        others = _documents(tokenizer, config)
        return {name: text for name, text in own.items() if name not in _OF_TOKENIZER} | {
            name: text for name, text in others.items() if name in _OF_TOKENIZER
        }
    if source.container == "gguf":
        length = config.get("max_position_embeddings")
        texts = tokenizer_documents(source, length if isinstance(length, int) else 1 << 20)
        return {name: text.encode() for name, text in texts.items()}
    found = {}
    for path in [*sorted(source.root.iterdir()), source.root / TOOL_TEMPLATE]:
        wanted = path.suffix in _DOCUMENTS or path.name.upper().startswith(FOR_PEOPLE)
        skipped = path.name in ("config.json", *_QUANTIZATION_FILES, *_OF_OTHER_WEIGHTS)
        skipped = skipped or path.suffix.lower() in _NEVER
        if not wanted or skipped or path.name.endswith(".index.json") or not path.is_file():
            continue
        if check_regular_file(path) <= _DOCUMENT_BYTES:
            found[str(path.relative_to(source.root))] = path.read_bytes()
    return found


def left_out(source: SourceModel, container: str = "safetensors") -> list[str]:
    """What to tell of parts of a model that are never written: layers that predict further tokens, and code
    of its own beside folders."""
    notes = []
    if source.prediction:
        notes.append(
            f"{len(source.prediction)} tensors of layers that predict further tokens (MTP) were left out, "
            f"like {printable(source.prediction[0])}"
        )
    if container != "gguf" and "auto_map" in source.header.config:
        notes.append(
            "the model's own code (auto_map in config.json) was left out: tools that run it need its .py "
            "files from the original beside this config.json"
        )
    return notes


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
