"""convert: a checkpoint in another format, the numbers the same; or as plain floats.

Nothing is quantized here. A format that cannot hold a module's numbers exactly refuses, naming the module
and the reason, before anything is written. ``dense`` holds everything: in float32 exactly, in a narrower
type either exactly too (``exact_dtype``) or, where the user asks for it, rounded and the rounding counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.safetensors_writer import SHARD_BYTES
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, thousands
from lowbit.formats.dense_writer import DenseWriter, exact_dtype
from lowbit.formats.gguf_writer import GgufWriter
from lowbit.formats.respelling import plain, respelled, spelled_out
from lowbit.formats.writing import EMBEDDINGS, CheckpointWriter, cannot, writer_of
from lowbit.loading.gguf_saving import require_gguf, save_gguf
from lowbit.loading.saving import NamedTensor, planned_nbytes, save_checkpoint
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule, SourceVector
from lowbit.numerics.scheme import Scheme, dense

Progress = Callable[[int, int, str], None]


@dataclass
class Conversion:
    """What was written. ``dtype``: of the plain numbers, None where they were left as they are."""

    out: Path
    form: str
    dtype: str | None
    modules: int
    nbytes: int = 0
    rounding: float = 0.0
    notes: list[str] = field(default_factory=list)


def convert(
    header: CheckpointHeader,
    form: str,
    out: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    strict: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
) -> Conversion:
    """Write the checkpoint in format ``form`` to the folder ``out``. ``dtype``: bf16, f16 or f32."""
    source = SourceModel(header, strict=strict)
    if form == "gguf":
        require_gguf()
    writer, told = _writer(source, form, dtype)
    done = Conversion(out, form, told, len(source.modules), notes=_notes(source, form))
    if isinstance(writer, GgufWriter):
        return _to_gguf(source, writer, done, force, on_progress)
    nbytes = planned_nbytes((writer.schemes[one.target.stored], one.target.shape) for one in source.modules)
    with TensorData(header) as data:
        save_checkpoint(
            out,
            header,
            source.hf_config(data),
            _parts(source, data, writer, on_progress),
            writer,
            nbytes=nbytes + sum(part.nbytes for part in source.parts if isinstance(part, SourceVector)),
            tensors=4 * len(source.parts),
            dtype=told,
            force=force,
            shard_bytes=shard_bytes,
        )
    done.nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if isinstance(writer, DenseWriter):
        done.rounding = writer.rounding
    return done


def _to_gguf(
    source: SourceModel, writer: GgufWriter, done: Conversion, force: bool, on_progress: Progress | None
) -> Conversion:
    with TensorData(source.header) as data:
        notes = save_gguf(
            done.out,
            source,
            writer.schemes,
            lambda module: _read(source, module, data, writer),
            data,
            force=force,
            on_progress=on_progress,
        )
    done.notes += notes
    done.nbytes = done.out.stat().st_size
    return done


def _read(
    source: SourceModel, module: SourceModule, data: TensorData, writer: CheckpointWriter
) -> ReadModule:
    """The module in its planned scheme; the dense writer makes floats of any."""
    read = source.read(module, data)
    if isinstance(writer, DenseWriter):
        return read
    return replace(read, weight=respelled(read.weight, writer.schemes[module.target.stored]))


def _writer(source: SourceModel, form: str, dtype: str | None) -> tuple[CheckpointWriter, str | None]:
    """The writer for the whole source, every module asked; and the type of plain numbers."""
    kind = writer_of(form)
    schemes = {module.target.stored: module.scheme for module in source.modules}
    if issubclass(kind, DenseWriter):
        told = dtype or _widest([exact_dtype(scheme) for scheme in schemes.values()])
        return DenseWriter(dict.fromkeys(schemes, dense(told)), told, exact=dtype is None), told
    if dtype is not None:
        raise LowbitError("E0104", f"--dtype is for --format dense; {form} keeps every number as it is")
    if form == "gguf" and source.header.container == "gguf":
        raise LowbitError("E0450", f"--format gguf: {source.header.root.name} is a GGUF file already")
    if form != "gguf" and all(scheme.is_dense for scheme in schemes.values()):
        raise LowbitError(
            "E0450",
            f"--format {form}: {source.header.root.name} is not quantized, and convert does not quantize; it "
            "writes the numbers there are in another format",
        )
    planned = {module.target.stored: _planned(kind, module) for module in source.modules}
    return kind(planned), None


def _planned(kind: type[CheckpointWriter], module: SourceModule) -> Scheme:
    """The scheme in which ``kind`` holds the module's numbers; E0450 where there is none.

    Embeddings and heads that it cannot hold are written as plain floats, as most checkpoints have them.
    """
    scheme = module.scheme if kind is GgufWriter else spelled_out(module.scheme)
    if scheme.is_dense:
        return scheme
    reason = kind.refuses_to_write(scheme, module.target.shape)
    if module.target.expert is not None and not kind.stacks:
        reason = "it is one of a stack of experts"
    leaf = module.place.part.name.rpartition(".")[2]
    if leaf in EMBEDDINGS and not kind.embeddings:
        reason = "it is an embedding"
    if reason is None:
        return scheme
    if leaf in (*EMBEDDINGS, "lm_head"):
        return plain(scheme)
    raise cannot(kind.name, module.target, reason)


def _widest(names: list[str]) -> str:
    """The narrowest type that holds all of these: bf16 and f16 together need f32."""
    found = set(names)
    return found.pop() if len(found) == 1 else "f32"


def _parts(
    source: SourceModel, data: TensorData, writer: CheckpointWriter, on_progress: Progress | None
) -> Iterator[ReadModule | NamedTensor]:
    done, total = 0, sum(part.nbytes for part in source.parts)
    for part in source.parts:
        if isinstance(part, SourceModule):
            yield _read(source, part, data, writer)
        else:
            yield NamedTensor(part.target, _vector(source, part, data, writer))
        done += part.nbytes
        if on_progress is not None:
            on_progress(done, total, "converting")


def _vector(source: SourceModel, part: SourceVector, data: TensorData, writer: CheckpointWriter) -> Tensor:
    tensor = source.read_vector(part, data)
    # A norm in float32 beside bf16 matrices: in their type where that loses nothing.
    return writer.narrowed(tensor) if isinstance(writer, DenseWriter) else tensor


def _notes(source: SourceModel, form: str) -> list[str]:
    """What does not survive."""
    notes = []
    activations = {str(module.scheme.activation) for module in source.modules if module.scheme.activation}
    if form == "dense" and activations:
        notes.append(f"inputs are no longer quantized (they were: {'; '.join(sorted(activations))})")
    if source.has_kv_scales:
        notes.append("the KV cache's scales were left out")
    return notes


def summary(done: Conversion) -> list[str]:
    """What to tell a person, a line each."""
    exact = "every number as it was"
    if done.form == "dense" and done.dtype is not None:
        exact = f"{done.dtype}, exact"
        if done.rounding:
            exact = f"{done.dtype}: largest relative rounding {100 * done.rounding:.2g} %"
    lines = [f"{done.out}: {done.form}, {done.modules} modules, {thousands(done.nbytes)} bytes ({exact})"]
    return lines + done.notes
