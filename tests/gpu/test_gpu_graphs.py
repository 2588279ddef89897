"""Decode steps of every family and format as CUDA graphs: ``CudaRecorder`` over a stand-in for CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from forward_helpers import PAGE, allocate, chunk_batch
from gpu.cuda_stand_in import StandIn
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.cuda_graphs import CudaRecorder, GraphedSteps, StepGraphs
from lowbit.kernels.attention import LayerCache
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, state_bytes
from lowbit.loading import load_model
from lowbit.models.model import Model

FIXTURES = Path(__file__).parents[1] / "fixtures"
PAGES, CONTEXT = 8, 64
slow = pytest.mark.slow

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA itself is there: test_gpu_engine"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def numbers_of(caches: list[LayerMemory]) -> list[Tensor]:
    return [
        tensor
        for cache in caches
        for tensor in (
            cache.buffers.values() if isinstance(cache, LayerCache) else (cache.inputs, cache.matrices)
        )
    ]


def decode(model: Model, rows: list[tuple[int, int, list[int]]]) -> ForwardBatch:
    """One token of each of (token, tokens before, pages)."""
    return chunk_batch(
        [([token % model.vocab_size], before, pages) for token, before, pages in rows],
        state_slots=list(range(len(rows))),
    )


def check(path: Path) -> None:
    """Graphs of two sizes replay steps at other tokens, positions, pages and lengths than they were captured
    with; a row of padding changes nothing."""
    model = load_model(open_checkpoint(str(path)), device="cpu", dtype="bfloat16")
    assert not model.spans_tokens
    caches = allocate(model, PAGES)
    assert {cache.kernel.name for cache in caches} == {"gpu"}
    size, one = (2, CONTEXT), (1, CONTEXT)
    with StandIn().entered() as cuda:
        graphs = StepGraphs(
            lambda batch: model.forward(batch, caches),
            CudaRecorder(model.device),
            2,
            context=CONTEXT,
            page_size=PAGE,
            vocabulary=model.vocab_size,
            device=model.device,
            states=state_bytes(model.cache_specs()) > 0,
        )
        steps = GraphedSteps(lambda b: model.forward(b, caches), graphs, (1, 2), context=CONTEXT, padded=True)
        steps.capture_all()
        assert not steps.refusal and set(steps.sizes) == {size, one}
        assert len(cuda.graphs) == 2 and all(len(graph.works) > 4 for graph in cuda.graphs)
        prompts = [([5, 9, 3, 7, 1], 0, [3, 5]), ([4, 8, 15], 0, [6, 1])]
        prompts = [([t % model.vocab_size for t in tokens], *rest) for tokens, *rest in prompts]
        model.forward(chunk_batch(prompts, state_slots=[0, 1]), caches)
        for rows in (
            [(11, 5, [3, 5]), (2, 3, [6, 1])],
            [(29, 6, [3, 5])],
            [(7, 19, [3, 5]), (30, 35, [6, 1, 2])],
        ):
            batch = decode(model, rows)
            before = [tensor.clone() for tensor in numbers_of(caches)]
            wanted = model.forward(batch, caches).clone()
            after = [tensor.clone() for tensor in numbers_of(caches)]
            for tensor, number in zip(numbers_of(caches), before, strict=True):
                tensor.copy_(number)
            found = steps.run(batch)
            assert found.isfinite().all()
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
            for tensor, number in zip(numbers_of(caches), after, strict=True):
                torch.testing.assert_close(tensor.float(), number.float(), rtol=2e-2, atol=2e-2)
        assert steps.replayed == 3


SCHEMES = [
    "awq/gemm",
    "compressed_tensors/w8a8_dynamic",
    *(pytest.param(name, marks=slow) for name in (
        "gptq/w4_asym_actorder",
        "fp8/block_128",
        "fp8/tensor_static",
        "compressed_tensors/fp8_channel_dynamic",
        "exl3/3inst_signs",
        "aqlm/2x8_g8",
        "vptq/v6_k64_outliers",
        "quip_sharp/e8p12",
        "transforms/quip_w4a16",
        "transforms/spinquant_w8a8",
        "fp_quant/nvfp4",
    )),
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name: str) -> None:
    check(FIXTURES / name)


FAMILIES = sorted(path.relative_to(FIXTURES).as_posix() for path in FIXTURES.glob("gguf*families/*.gguf"))
FEW = ("gguf_families/qwen3moe.gguf",)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=slow) for n in FAMILIES])
def test_families(name: str) -> None:
    check(FIXTURES / name)
