"""CheckpointHeader: what a checkpoint says about itself, read without touching one tensor byte.

A checkpoint is a Hugging Face folder (safetensors, or PyTorch's pickled files), a GGUF file (or the first of
a split) or a name that resolves to one. Whatever it is, it becomes named tensors with dtype, shape and place,
and a config. This package imports no torch: the HTTP process reads tokenizers and configs through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TensorEntry:
    """Where one stored tensor lies. ``start`` and ``nbytes`` were checked against the real file size.

    ``dtype`` is the container's own name: ``BF16``, ``F8_E4M3``, ``I32`` … for safetensors and pickles,
    ``Q4_1``, ``F32`` … for GGUF. ``shape`` is row-major, (out, in) for a matrix in both containers
    (GGUF's reversed dims are turned round), in elements, not bytes. ``axes``: those of a transposed matrix in
    the order they lie in the file, the outermost first; None where that is their own.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    axes: tuple[int, ...] | None = None

    def is_matrix_of(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape may have been written as this one.

        ggml forgets rows where there is one: llama-quantize writes a (1, in) gate as (in,).
        """
        return self.shape in {shape[start:] for start in range(len(shape)) if set(shape[:start]) <= {1}}


@dataclass(frozen=True)
class CheckpointHeader:
    """The files of one checkpoint.

    ``root``: the folder, or the GGUF file. ``config``: config.json, or {} for GGUF. ``metadata``: GGUF
    metadata or safetensors ``__metadata__``. ``documents``: every other small JSON or text file of the
    folder that lowbit may read, by name (tokenizer_config.json, generation_config.json,
    quantize_config.json, chat_template.jinja …), parsed when asked through ``checkpoint.documents``.
    ``rotary_pairs``: the two rows that rotate together lie side by side, as GGUF's do (Mistral's own files).
    """

    root: Path
    container: Literal["safetensors", "pickle", "gguf"]
    tensors: dict[str, TensorEntry]
    config: dict[str, object] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    revision: str | None = None
    rotary_pairs: bool = False

    @property
    def folder(self) -> Path:
        """Where the documents beside the weights are."""
        return self.root.parent if self.container == "gguf" else self.root

    def file_of(self, tensor: str) -> str:
        """The short name of the file that holds ``tensor``, for messages."""
        entry = self.tensors.get(tensor)
        return entry.file.name if entry else self.root.name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())
