"""What quality is measured against: two float originals of the embedded model, and their float32 answers.

The embedded model's file holds Q4_1 blocks. Its numbers as bfloat16 (``stored``) lie on a grid of 16 levels
for every 32 columns, so whatever has 4 bits and groups of 32 finds them again and looks free. The second
original (``dithered``) has them moved off that grid: each weight by a uniform random number of at most half a
step of its own block, from a fixed seed. As likely as not a float model that file could have been made from,
and no grid lies under it.

The answers: log-probabilities of every next token over English text, computed from the original with float32
arithmetic and cache. They are kept on disk, 4 bytes for each position and token of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.formats.dense_writer import DenseWriter
from lowbit.kernels.attention import PAGE_SIZE
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.prompt_rows import rounding
from lowbit.kernels.recurrent import allocate_layer
from lowbit.loading import load_model
from lowbit.loading.convert import convert
from lowbit.loading.saving import NamedTensor, save_checkpoint
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule
from lowbit.models.model import Model
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import dense
from lowbit.quantize.calibration import built_in_texts
from lowbit.tokenization import load_tokenizer

SOURCE = "smollm2"
SEED = 20240229
STORED, DITHERED = "stored", "dithered"
ORIGINALS = (DITHERED, STORED)
# Chapters of Python's language reference, which every installation carries.
TOPICS = ("execmodel", "types", "import", "naming", "objects")
LENGTH = 480  # tokens of a prompt


def write_originals(folder: Path, source: str = SOURCE) -> dict[str, Path]:
    """Both originals as bfloat16 folders below ``folder``, written where they are not there yet."""
    header = open_checkpoint(source)
    paths = {name: folder / name for name in ORIGINALS}
    if not paths[STORED].exists():
        convert(header, "dense", paths[STORED], dtype="bf16")
    if not paths[DITHERED].exists():
        write_dithered(header, paths[DITHERED])
    return paths


def write_dithered(header: CheckpointHeader, out: Path, seed: int = SEED) -> None:
    """The checkpoint as bfloat16, every weight of a block format moved inside its own step."""
    source = SourceModel(header)
    f32 = dense("f32")
    writer = DenseWriter({module.target.stored: f32 for module in source.modules}, "bf16")
    nbytes = 2 * sum(module.target.shape[0] * module.target.shape[1] for module in source.modules)
    with TensorData(header) as data:
        save_checkpoint(
            out,
            header,
            source.hf_config(data),
            lambda known: _dithered_parts(source, data, torch.Generator().manual_seed(seed), writer),
            writer,
            nbytes=nbytes,
            tensors=2 * len(source.parts),
            dtype="bf16",
        )


def _dithered_parts(
    source: SourceModel, data: TensorData, generator: torch.Generator, writer: DenseWriter
) -> Iterator[ReadModule | NamedTensor]:
    for part in source.parts:
        if isinstance(part, SourceModule):
            read = source.read(part, data)
            matrix = dithered(read.weight, generator)
            weight = QuantizedTensor(dense("f32"), read.weight.shape, matrix, origin=read.weight.origin)
            yield replace(read, weight=weight)
        else:
            yield NamedTensor(part.target, writer.narrowed(source.read_vector(part, data)))


def dithered(weight: QuantizedTensor, generator: torch.Generator) -> Tensor:
    """float32 (out, in): each weight plus uniform(-step / 2, step / 2), the step its block's own."""
    exact = weight.dequantize()
    if weight.scheme.is_dense:
        return exact
    small = weight.expand()
    step = torch.ones(())
    for scale, (_, columns) in zip(small.scales, small.scheme.blocks, strict=True):
        step = step * scale.float().abs().repeat_interleave(columns, -1)  # (out, in)
    noise = torch.rand(exact.shape, generator=generator) - 0.5
    return exact.addcmul_(noise, step)


def english_text() -> str:
    """The chapters without the paragraphs that are also in the calibration text, or there twice."""
    seen = {paragraph.strip() for text in built_in_texts() for paragraph in text.split("\n\n")}
    kept = []
    for name in TOPICS:
        paragraphs = topics[name].split("\n\n")
        kept += [paragraph for paragraph in paragraphs if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in paragraphs)
    return "\n\n".join(kept)


def english_prompts(positions: int, source: str = SOURCE) -> list[list[int]]:
    """Token ids of English text, at least ``positions`` of them, in prompts of ``LENGTH``."""
    tokens = load_tokenizer(open_checkpoint(source)).encode(english_text())
    count = -(-positions // LENGTH)
    if count * LENGTH > len(tokens):
        raise SystemExit(f"--positions: the text has {len(tokens) // LENGTH * LENGTH} tokens")
    return [tokens[number * LENGTH : (number + 1) * LENGTH] for number in range(count)]


def prompt_logits(model: Model, prompt: list[int], *, exact: bool = True) -> Tensor:
    """float32 (tokens, vocabulary): the logits of every position of one prompt. ``exact``: from weights as
    they are stored, as after --exact-prompts; else as prompts are served."""
    count, pages = len(prompt), -(-len(prompt) // PAGE_SIZE)
    every = torch.arange(count, dtype=torch.int32)
    batch = ForwardBatch(
        tokens=torch.tensor(prompt, dtype=torch.int32),
        positions=every,
        write_slots=every.clone(),
        query_lengths=torch.tensor([count], dtype=torch.int32),
        context_lengths=torch.tensor([count], dtype=torch.int32),
        page_table=torch.arange(pages, dtype=torch.int32)[None],
        sample_rows=every.long(),
        page_size=PAGE_SIZE,
        max_query=count,
        max_context=count,
        state_slots=torch.zeros(1, dtype=torch.int32),
        prompt_row=0 if not exact and rounding(model.device.type) else None,
    )
    caches = [allocate_layer(spec, pages, 1, PAGE_SIZE, model.device) for spec in model.cache_specs()]
    return model.forward(batch, caches)


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from the reference, in nats: KL(reference ‖ model)."""

    positions: int
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float

    @classmethod
    def of(cls, divergences: list[Tensor], same_first: list[Tensor]) -> Divergence:
        """From each position's KL and whether both sides name the same token first."""
        kl = torch.cat(divergences).double()
        return cls(
            kl.numel(),
            float(kl.mean()),
            float(kl.quantile(0.99)),
            float(kl.max()),
            float(torch.cat(same_first).double().mean()),
        )


class Reference:
    """The original's float32 log-probabilities over ``prompts``, in a file beside its folder."""

    def __init__(self, original: Path, prompts: list[list[int]]) -> None:
        self.original, self.prompts = original, prompts
        self._file = original.with_name(f"{original.name}.logprobs")
        self._about = original.with_name(f"{original.name}.logprobs.json")

    def prepare(self) -> None:
        """Compute it, unless the file has it already, perhaps for more prompts than these."""
        if self._prompts_kept()[: len(self.prompts)] == self.prompts:
            return
        model = load_model(open_checkpoint(str(self.original)), device="cpu", dtype="float32")
        self._about.unlink(missing_ok=True)
        with self._file.open("wb") as file:
            for prompt in self.prompts:
                file.write(torch.log_softmax(prompt_logits(model, prompt), -1).numpy().tobytes())
        self._about.write_text(json.dumps(self.prompts))

    def _prompts_kept(self) -> list[list[int]]:
        if not self._about.exists():
            return []
        kept: list[list[int]] = json.loads(self._about.read_text())
        return kept

    def log_probabilities(self) -> Iterator[Tensor]:
        """float32 (tokens, vocabulary) for each prompt, one in memory at a time."""
        vocabulary = self._file.stat().st_size // 4 // sum(len(prompt) for prompt in self._prompts_kept())
        start = 0
        for prompt in self.prompts:
            shape = (len(prompt), vocabulary)
            yield torch.from_numpy(np.memmap(self._file, np.float32, "c", 4 * start * vocabulary, shape))
            start += len(prompt)

    def divergence(self, model: Model) -> Divergence:
        """Of a model, over all prompts."""
        divergences, same_first = [], []
        for prompt, expected in zip(self.prompts, self.log_probabilities(), strict=True):
            kl, same = compare(expected, prompt_logits(model, prompt))
            divergences.append(kl)
            same_first.append(same)
        return Divergence.of(divergences, same_first)


def compare(expected: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and a model's logits (tokens, vocabulary) -> KL and agreement of each token."""
    found = torch.log_softmax(logits, -1)
    same = expected.argmax(-1) == found.argmax(-1)
    return (expected.exp() * (expected - found)).sum(-1), same
