"""Graphs of decode steps, with a stand-in for CUDA's: sizes, padding, static inputs, what turns them off."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from checkpoint import tiny
from engine.graph_stand_in import Attention, PaddedAttention, StandInRecorder
from engine.stand_in import ByteTokenizer
from engine.test_step_capture import SCHEMES, Forward, decode, quantize_inputs, tiny_llama
from forward_helpers import PAGE
from lowbit.engine.cuda_graphs import GRAPHS, OCCURRENCES, GraphedSteps, StepGraphs, bucket_sizes
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams
from lowbit.errors import LowbitError
from lowbit.kernels import attention
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.models.decoder import Decoder
from lowbit.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_the_engine_runs() -> Iterator[None]:
    """torch alone, as beside native kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)),
        ({"cuda_graph_max_bs": 20}, (1, 2, 4, 8, 16, 20)),
        ({"cuda_graph_max_bs": 1}, (1,)),
        ({"cuda_graph_max_bs": 16}, (1, 2, 4, 8, 16)),
        ({"max_running_requests": 3}, (1, 2, 3)),
        ({"max_running_requests": 1000}, (1, 2, 4, 8, *range(16, 257, 8))),
        ({"cuda_graph_bs": "8,3,3"}, (3, 8)),
        ({"cuda_graph_bs": "1 5 9", "cuda_graph_max_bs": 6}, (1, 5)),
    ],
    ids=str,
)
def test_sizes(options: dict[str, object], sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(Settings(**options)) == sizes  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "1,x", ",", "-1", "1.5", "²"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(LowbitError, match="--cuda-graph-bs needs whole numbers"):
        bucket_sizes(Settings(cuda_graph_bs=text))


def steps_of(
    forward: Forward,
    recorder: StandInRecorder,
    sizes: tuple[int, ...],
    *,
    context: int,
    vocabulary: int,
    padded: bool,
    exact_context: bool = False,
) -> GraphedSteps:
    context = -(-context // PAGE) * PAGE
    graphs = StepGraphs(
        forward, recorder, sizes[-1], context=context, page_size=PAGE, vocabulary=vocabulary, device=CPU
    )
    return GraphedSteps(forward, graphs, sizes, context=context, padded=padded, exact_context=exact_context)


class Seen:
    """A forward pass that notes what it is given."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.batches: list[tuple[int, int, tuple[int, ...]]] = []  # rows, real rows, addresses

    def __call__(self, batch: ForwardBatch) -> Tensor:
        addresses = (batch.tokens.data_ptr(), batch.page_table.data_ptr(), batch.sample_rows.data_ptr())
        with _disable_current_modes():
            real = int((batch.write_slots >= 0).sum())
            assert int((batch.context_lengths > 0).sum()) in (real, len(batch.context_lengths))
        self.batches.append((len(batch.tokens), real, addresses))
        return self._forward(batch)


def graphed(
    seen: list[Seen], recorder: StandInRecorder, sizes: tuple[int, ...], **options: Any
) -> Callable[[Forward], GraphedSteps]:
    def make(forward: Forward) -> GraphedSteps:
        seen.append(Seen(forward))
        given = {"context": 200, "padded": True, **options}
        return steps_of(seen[0], recorder, sizes, vocabulary=tiny.VOCABULARY, **given)

    return make


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs), f"step {step}"


@pytest.mark.parametrize("scheme", ["plain", "int8 per token", "fp8 in groups"])
@pytest.mark.parametrize("at_start", [True, False])
def test_padded_steps_give_the_same_bits(
    scheme: str, at_start: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attention_kernels", lambda: [PaddedAttention()])

    model = quantize_inputs(tiny_llama(tmp_path), SCHEMES[scheme])
    expected = decode(model, lambda plain: plain, steps=60)
    seen: list[Seen] = []
    recorder = StandInRecorder()
    steps: list[GraphedSteps] = []

    def through(forward: Forward) -> Forward:
        steps.append(graphed(seen, recorder, (1, 2, 4))(forward))
        if at_start:
            heard: list[tuple[int, int, str]] = []
            steps[0].capture_all(lambda *news: heard.append(news))
            assert heard == [(n, 3, "CUDA graphs") for n in (1, 2, 3)]
            assert [rows for rows, _ in steps[0].sizes] == [4, 2, 1], "the largest first"
            seen[0].batches.clear()
        return steps[0].run

    compare(decode(model, through, steps=60), expected)
    assert recorder.captured == 3 and not steps[0].refusal
    graphs = [entry for entry in seen[0].batches if entry[0] in (1, 2, 4)]
    assert {rows: real for rows, real, _ in graphs if real < rows} == {4: 3}, "3 became 4 and nothing else"
    assert {rows for rows, _, _ in seen[0].batches} >= {1, 2, 4, 5, 6}, "5 and 6 ran as they were"
    if at_start:
        addresses = {(rows, places) for rows, _, places in graphs}
        assert len(addresses) == 3, "a size always reads the same memory"
        assert steps[0].replayed == len(graphs)
    assert steps[0].replayed > 20


@pytest.mark.parametrize("scheme", ["fp8 per tensor", "llm.int8", "delayed"])
def test_rows_that_depend_on_each_other_are_never_padded(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attention_kernels", lambda: [PaddedAttention()])
    models: list[Decoder] = []

    def make() -> Decoder:
        models.append(quantize_inputs(tiny_llama(tmp_path), SCHEMES[scheme]))
        return models[-1]

    expected = decode(make(), lambda plain: plain, steps=60)
    seen: list[Seen] = []
    recorder = StandInRecorder()
    steps: list[GraphedSteps] = []

    def through(forward: Forward) -> Forward:
        steps.append(graphed(seen, recorder, (1, 2, 8), padded=False)(forward))
        steps[0].capture_all()
        assert recorder.captured == 0, "which sizes there will be nobody knows"
        return steps[0].run

    compare(decode(make(), through, steps=60), expected)
    assert all(rows == real for rows, real, _ in seen[0].batches)
    assert {rows for rows, _ in steps[0].sizes} == {1, 2, 3, 5, 6}
    assert steps[0].replayed > 60 - 5 * OCCURRENCES - 1
    for (name, ours), (_, theirs) in zip(models[1].states, models[0].states, strict=True):
        assert torch.equal(ours.scale, theirs.scale), name
        assert torch.equal(ours.amax_history, theirs.amax_history), "each step counts once"


def test_reference_attention_gets_exact_sizes_and_near_contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attention_kernels", lambda: [Attention()])
    model = tiny_llama(tmp_path, max_position_embeddings=512)
    expected = decode(model, lambda plain: plain, steps=60, longest=240)
    seen: list[Seen] = []
    steps: list[GraphedSteps] = []

    def through(forward: Forward) -> Forward:
        make = graphed(seen, StandInRecorder(), (8,), context=600, padded=False, exact_context=True)
        steps.append(make(forward))
        return steps[0].run

    compare(decode(model, through, steps=60, longest=240), expected)
    assert {context for _, context in steps[0].sizes} == {256, 512}
    assert all(rows == real for rows, real, _ in seen[0].batches)


def batch_of(rows: int, tokens: int | None = None) -> ForwardBatch:
    def column(count: int, value: int) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32)

    count = rows if tokens is None else tokens
    table = torch.zeros(rows, 1, dtype=torch.int32)
    return ForwardBatch(
        *(column(count, 1) for _ in range(3)),
        column(rows, 1),
        column(rows, 2),
        table,
        torch.arange(count),
        page_size=PAGE,
        max_query=count - rows + 1,
        max_context=2,
    )


def test_only_so_many_exact_sizes_are_kept() -> None:
    steps = steps_of(
        lambda batch: torch.zeros(len(batch.sample_rows), 8),
        StandInRecorder(),
        (2 * GRAPHS,),
        context=64,
        vocabulary=8,
        padded=False,
    )
    for rows in range(1, GRAPHS + 10):
        for _ in range(OCCURRENCES - 1):
            steps.run(batch_of(rows))
        assert rows not in {size for size, _ in steps.sizes}, "it may not occur again"
        steps.run(batch_of(rows))
        steps.run(batch_of(1))
    kept = [rows for rows, _ in steps.sizes]
    assert len(kept) == GRAPHS and kept[-1] == 1, "1 was always in use"
    assert 2 not in kept and GRAPHS + 9 in kept
    before = steps.replayed
    steps.run(batch_of(5, tokens=9))
    steps.run(batch_of(2 * GRAPHS + 1))
    assert steps.replayed == before, "drafts, and more than there are graphs for"


def test_a_step_that_waits_for_the_device_turns_graphs_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "attention_kernels", lambda: [PaddedAttention()])
    expected = decode(tiny_llama(tmp_path), lambda plain: plain)
    model = tiny_llama(tmp_path)
    down = model.blocks[0].mlp.down  # type: ignore[union-attr]
    original = type(down).__call__

    def waits(self: object, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self is down:
            x.abs().max().item()
        return original(self, x, out)  # type: ignore[arg-type]

    waits.__globals__["__name__"], name = "lowbit.layers.linear", waits.__globals__["__name__"]
    try:
        monkeypatch.setattr(type(down), "__call__", waits)
        steps: list[GraphedSteps] = []

        def through(forward: Forward) -> Forward:
            steps.append(graphed([], StandInRecorder(), (1, 2, 8))(forward))
            return steps[0].run

        compare(decode(model, through), expected)
    finally:
        waits.__globals__["__name__"] = name
    assert steps[0].replayed == 0 and steps[0].sizes == []
    (line,) = [record.message for record in caplog.records if "CUDA graphs off" in record.message]
    assert down.name in line and "synchronizing" in line and line.endswith("running eagerly")


def test_sizes_without_memory_run_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    steps = steps_of(
        lambda batch: torch.full((len(batch.sample_rows), 8), float(len(batch.tokens))),
        StandInRecorder(memory=0),
        (2, 4),
        context=64,
        vocabulary=8,
        padded=True,
    )
    steps.capture_all()
    assert caplog.text.count("no memory for a CUDA graph") == 2
    assert float(steps.run(batch_of(3))[0, 0]) == 3.0, "not padded"
    assert steps.replayed == 0 and not steps.refusal


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_of_graphs(overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come and go, sampled, with a step in flight or none; graphs captured before the first."""
    monkeypatch.setattr(attention, "attention_kernels", lambda: [PaddedAttention()])
    model = tiny_llama(tmp_path)
    draw = random.Random(6)
    requests = []
    for index in range(14):
        prompt = tuple(draw.randrange(model.vocab_size) for _ in range(draw.randint(1, 40)))
        sampling = SamplingParams(
            temperature=index % 2 * 0.9, max_tokens=draw.randint(1, 25), seed=index, ignore_eos=index % 3 > 0
        )
        requests.append(Request(id=str(index), prompt=prompt, sampling=sampling))
    found: list[dict[str, list[int]]] = []
    for graphs in (False, True):
        settings = Settings(
            device="cpu", max_total_tokens=640, max_running_requests=7, disable_cuda_graph=True
        )
        forced = ForcedModes(on_device=True, overlap=overlap, retract_every=9, check=True)
        engine = Engine(model, ByteTokenizer(), settings, forced=forced)
        if graphs:
            runner = engine._runner
            sizes = (1, 2, 4, 6)
            runner._capture = runner.graphs(StandInRecorder(), sizes, engine.context_length)
            engine.prepare()
        tokens: dict[str, list[int]] = {}
        waiting = list(requests)
        while waiting or engine.has_work():
            if waiting:
                engine.submit(waiting.pop())
            for event in engine.step():
                tokens.setdefault(event.id, []).extend(event.tokens)
        found.append(tokens)
        captured = engine.status().captured_steps
        assert captured > 10 if graphs else captured == 0
    assert found[0] == found[1]
