"""Decode steps of every family and format as CUDA graphs: on a GPU CUDA's own, else those of a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forward_helpers import PAGE, allocate, chunk_batch
from gpu.cuda_stand_in import StandIn
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.cuda_graphs import CudaRecorder, GraphedSteps, StepGraphs
from lowbit.kernels.attention import LayerCache
from lowbit.kernels.device_memory import upload
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory, state_bytes
from lowbit.loading import load_model
from lowbit.models.model import Model

FIXTURES = Path(__file__).parents[1] / "fixtures"
PAGES, CONTEXT = 8, 64
slow = pytest.mark.slow

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.timeout(300)]


def numbers_of(caches: list[LayerMemory]) -> list[Tensor]:
    return [
        tensor
        for cache in caches
        for tensor in (
            cache.buffers.values() if isinstance(cache, LayerCache) else (cache.inputs, cache.matrices)
        )
    ]


def decode(model: Model, rows: list[tuple[int, int, list[int]]]) -> ForwardBatch:
    """One token of each of (token, tokens before, pages), as many before as the model's positions allow."""
    last = model.context_length - 1
    return chunk_batch(
        [([token % model.vocab_size], min(before, last), pages) for token, before, pages in rows],
        state_slots=list(range(len(rows))),
    )


def check(path: Path, device: torch.device) -> None:
    """Graphs of two sizes replay steps at other tokens, positions, pages and lengths than they were captured
    with. On a GPU a prompt's logits are also those that torch has on a CPU."""
    model = load_model(open_checkpoint(str(path)), device=device.type, dtype="bfloat16")
    assert not model.spans_tokens
    caches = allocate(model, PAGES)
    assert {cache.kernel.name for cache in caches} == {"gpu"}
    size, one = (2, CONTEXT), (1, CONTEXT)
    prompts = [([5, 9, 3, 7, 1], 0, [3, 5]), ([4, 8, 15], 0, [6, 1])]
    prompts = [([t % model.vocab_size for t in tokens], *rest) for tokens, *rest in prompts]
    batch = chunk_batch(prompts, state_slots=[0, 1])
    stand_in = None if device.type == "cuda" else StandIn()
    with nullcontext() if stand_in is None else stand_in.entered():
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
        if stand_in is not None:
            assert len(stand_in.graphs) == 2 and all(len(graph.works) > 4 for graph in stand_in.graphs)
        logits = model.forward(batch.to(device), caches).cpu()
        assert logits.isfinite().all()
        if stand_in is None:
            near(logits, path, batch)
        for rows in (
            [(11, 5, [3, 5]), (2, 3, [6, 1])],
            [(29, 6, [3, 5])],
            [(7, 19, [3, 5]), (30, 35, [6, 1, 2])],
        ):
            batch = decode(model, rows).to(device)
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


def near(logits: Tensor, path: Path, batch: ForwardBatch) -> None:
    """Logits of a batch on a GPU are a CPU's but for rounding, which may send a token to another expert; a
    wrong kernel's have nothing in common with them."""
    on_cpu = load_model(open_checkpoint(str(path)), device="cpu", dtype="float32")
    wanted = on_cpu.forward(batch, allocate(on_cpu, PAGES))
    both = [values - values.mean(1, keepdim=True) for values in (logits, wanted)]
    alike = torch.nn.functional.cosine_similarity(*both)
    assert alike.median() > 0.98, alike


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
        "aqlm/1x12_g4x2",
        "quip_sharp/e8p12",
        "spqr/ptcsr_act_order",
        "hqq/4_column",
        "bitsandbytes/nf4",
        "paroquant/g32",
        "transforms/quip_w4a16",
        "transforms/spinquant_w8a8",
        "fp_quant/nvfp4",
    )),
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name: str, device: torch.device) -> None:
    check(FIXTURES / name, device)


FAMILIES = sorted(path.relative_to(FIXTURES).as_posix() for path in FIXTURES.glob("gguf*families/*.gguf"))
FEW = ("gguf_families/qwen3moe.gguf",)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=slow) for n in FAMILIES])
def test_families(name: str, device: torch.device) -> None:
    check(FIXTURES / name, device)


def steps_that(compute: Callable[[], Tensor]) -> GraphedSteps:
    """Decode steps of 4 tokens' logits, captured."""
    device = torch.device("cpu")
    options = {"page_size": PAGE, "vocabulary": 4, "device": device}
    graphs = StepGraphs(lambda _: compute(), CudaRecorder(device), 1, context=CONTEXT, **options)
    steps = GraphedSteps(lambda _: compute(), graphs, (1,), context=CONTEXT, padded=True)
    steps.capture_all()
    return steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the stand-in")
@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (lambda: torch.full((1, 4), torch.ones(1, device="cpu").item(), device="cpu"), "synchronizing"),
        (lambda: torch.tensor([[1.0, 2, 3, 4]], device="cpu"), "uploads numbers"),
        (lambda: torch.zeros(1, 4), "on which device"),
        (lambda: upload([np.zeros((1, 4), np.float32)], torch.device("cpu"))[0], "numbers of the host"),
    ],
    ids=["item", "tensor", "no device", "upload"],
)
def test_what_the_stand_in_refuses(compute: Callable[[], Tensor], said: str) -> None:
    with StandIn().entered():
        assert said in steps_that(compute).refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the stand-in")
def test_the_stand_in_replays_what_was_recorded_and_nothing_else() -> None:
    """A number of Python's stays, and what a capture made is lost where no replay makes it again."""
    calls: list[Tensor] = []

    def compute() -> Tensor:
        calls.append(torch.full((1, 4), float(len(calls)), device="cpu"))
        return calls[-1] + (calls[2] if len(calls) > 2 else calls[-1])

    with StandIn().entered():
        steps = steps_that(compute)
        assert len(calls) == 3, "eagerly, checked, and recorded"
        steps.graphs.replay(steps.graphs.padding((1, CONTEXT)), (1, CONTEXT))
        assert len(calls) == 3
        assert (steps.graphs.replay(steps.graphs.padding((1, CONTEXT)), (1, CONTEXT)) == 4.0).all()
