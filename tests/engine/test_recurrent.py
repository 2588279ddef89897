"""A model with recurrent layers in the engine: tokens and logits are its own alone, batched, in chunks,
retracted, in steps that overlap or are replayed; and what the engine does not do for it is said."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.graph_stand_in import AsOnADevice, Attention, PaddedAttention, StandInRecorder
from engine.stand_in import ByteTokenizer
from engine.test_engine import make_request
from engine.test_sameness import Recorder
from engine.test_step_capture import Forward, check, decode
from forward_helpers import chunk_batch
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.cuda_graphs import GraphedSteps, StepGraphs
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.memory import pool_pages
from lowbit.engine.scheduler import Chunk
from lowbit.engine.step_parts import Step
from lowbit.errors import LowbitError
from lowbit.kernels import attention, native, recurrent
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import state_bytes
from lowbit.kernels.recurrent_reference import ReferenceDelta
from lowbit.loading import load_model
from lowbit.models.model import Model
from lowbit.settings import Settings
from models.test_qwen_next import make_checkpoint, prompts

VOCABULARY, NEW_TOKENS = 64, 8
LENGTHS = (1, 2, 5, 17, 40, 63, 90, 130)


class Tokenizer(ByteTokenizer):
    """Without a token that ends answers."""

    stop_ids: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen_next")
    make_checkpoint(path, vocab_size=VOCABULARY)
    return path


@pytest.fixture(scope="module", params=["float", "fp8"])
def model(folder: Path, request: pytest.FixtureRequest) -> Model:
    quantization = None if request.param == "float" else request.param
    return load_model(open_checkpoint(str(folder)), device="cpu", quantization=quantization)


def engine_of(model: Model, forced: ForcedModes | None = None, **options: object) -> Engine:
    values = {"device": "cpu", "max_total_tokens": 2048, "max_running_requests": 8, **options}
    values.setdefault("num_continuous_decode_steps", 1)  # a recorder sees each step's logits
    return Engine(model, Tokenizer(), Settings(**values), forced=forced)


def answers(engine: Engine, given: list[list[int]]) -> list[list[int]]:
    """Tokens of each, all submitted at once."""
    tokens: dict[str, list[int]] = {}
    for number, prompt in enumerate(given):
        engine.submit(make_request(prompt, NEW_TOKENS, id=str(number), ignore_eos=True))
    while engine.has_work():
        for event in engine.step():
            assert event.finish_reason != "error", event.error
            tokens.setdefault(event.id, []).extend(event.tokens)
        assert engine.check() == []
    return [tokens[str(number)] for number in range(len(given))]


@pytest.fixture(scope="module")
def given() -> list[list[int]]:
    return [[token % VOCABULARY for token in prompt] for prompt in prompts(*LENGTHS)]


@pytest.fixture(scope="module")
def alone(model: Model, given: list[list[int]]) -> tuple[Recorder, list[list[int]]]:
    """Each by itself, the prompt in one piece."""
    engine = engine_of(model, max_running_requests=1)
    recorder = Recorder(engine)
    tokens = [answers(engine, [prompt])[0] for prompt in given]
    assert recorder.largest_batch == 1
    if native.library() is not None:
        assert engine.status().captured_steps >= len(given) * (NEW_TOKENS - 2)
    return recorder, tokens


CASES = {
    "batched": ({}, ForcedModes()),
    "a token a chunk": ({}, ForcedModes(chunk=1)),
    "odd chunks, retracted": ({}, ForcedModes(chunk=13, retract_every=3)),
    "few slots, few pages": (
        {"max_running_requests": 3, "max_total_tokens": 240, "chunked_prefill_size": 50},
        ForcedModes(),
    ),
    "overlapping, retracted": ({}, ForcedModes(overlap=True, chunk=21, retract_every=5)),
    "eager": ({"disable_cuda_graph": True}, ForcedModes(on_device=True)),
}


@pytest.mark.skipif(native.library() is None, reason="no native library: nothing is captured")
@pytest.mark.parametrize("forced", [ForcedModes(), ForcedModes(chunk=13, retract_every=2)], ids=str)
def test_steps_in_one_call_carry_states_on(
    forced: ForcedModes, model: Model, given: list[list[int]], alone: tuple[Recorder, list[list[int]]]
) -> None:
    engine = engine_of(model, forced, num_continuous_decode_steps=5)
    assert answers(engine, given) == alone[1]
    assert engine._launcher._continuous is not None


@pytest.mark.parametrize("case", CASES)
def test_answers_do_not_depend_on_company(
    case: str, model: Model, given: list[list[int]], alone: tuple[Recorder, list[list[int]]]
) -> None:
    options, forced = CASES[case]
    engine = engine_of(model, replace(forced, check=True), **options)
    recorder = None if forced.overlap else Recorder(engine)  # which has to know a step's tokens
    assert answers(engine, given) == alone[1]
    assert ("retract" in case or "few" in case) == (engine.status().preemptions > 0)
    assert recorder is None or recorder.largest_batch > 1
    if recorder is not None and native.library() is not None:
        assert recorder.seen <= alone[0].seen, "some bits of logits differ"


def test_decode_steps_are_replayed(folder: Path) -> None:
    if native.library() is None:
        pytest.skip("no native library: nothing is captured")
    capture = check(lambda: load_model(open_checkpoint(str(folder)), device="cpu"), drafts=(0,))
    assert not capture.refusal and capture.replayed


def test_on_the_reference_steps_run_eagerly_and_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.library() is None:
        pytest.skip("no native library: nothing is captured")
    monkeypatch.setattr(recurrent, "recurrent_kernels", lambda: [ReferenceDelta()])
    engine = engine_of(load_model(open_checkpoint(str(folder)), device="cpu"))
    with caplog.at_level(logging.WARNING):
        answers(engine, [[5, 6, 7]])
    assert "step capture off" in caplog.text and engine.status().captured_steps == 0


@pytest.mark.parametrize("memory", [3, 1])
@pytest.mark.parametrize("case", ["padded at start", "padded", "exact"])
def test_graphs_move_states_on_once(
    case: str, memory: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding rows move nobody's state, and a capture that runs the step, or fails, none at all."""
    padded = case != "exact"
    monkeypatch.setattr(
        attention, "attention_kernels", lambda: [PaddedAttention() if padded else Attention()]
    )
    monkeypatch.setattr(recurrent, "recurrent_kernels", lambda: [AsOnADevice()])
    model, recorder = load_model(open_checkpoint(str(folder)), device="cpu"), StandInRecorder(memory=memory)
    expected = decode(model, lambda plain: plain)
    steps: list[GraphedSteps] = []

    def through(forward: Forward) -> Forward:
        options = {"page_size": 16, "vocabulary": VOCABULARY, "device": torch.device("cpu")}
        graphs = StepGraphs(forward, recorder, 8, context=208, states=True, **options)
        steps.append(GraphedSteps(forward, graphs, (1, 2, 4, 8), context=208, padded=padded))
        if case == "padded at start":
            steps[0].capture_all()
        return steps[0].run

    for step, (ours, theirs) in enumerate(zip(decode(model, through), expected, strict=True)):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), f"step {step}"
    assert steps[0].replayed > 0 and not steps[0].refusal and recorder.captured == memory


class InUnits(ReferenceDelta):
    """Would take so many tokens together."""

    unit = 32


@pytest.mark.parametrize("budget", [48, 31])
def test_prompts_are_cut_where_the_kernel_asks(
    budget: int, folder: Path, given: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At multiples of its unit, also where others leave less than one of the step's budget; but anywhere
    where no step has room for one."""
    monkeypatch.setattr(recurrent, "recurrent_kernels", lambda: [InUnits()])
    model = load_model(open_checkpoint(str(folder)), device="cpu")
    engine = engine_of(model, ForcedModes(check=True), chunked_prefill_size=budget, disable_cuda_graph=True)
    run, ends = engine._launcher._run, []

    def seen(chunks: list[Chunk], flying: Step | None) -> Step | None:
        ends.extend((c.sequence.computed + c.count, c.completes) for c in chunks)
        assert sum(chunk.count for chunk in chunks if chunk.count > 1) <= budget
        return run(chunks, flying)

    monkeypatch.setattr(engine._launcher, "_run", seen)
    found = answers(engine, given)
    assert [len(tokens) for tokens in found] == [NEW_TOKENS] * len(given)
    cuts = [end % 32 for end, completes in ends if not completes]
    assert len(cuts) > 5 and any(cuts) == (budget < 32)


def test_a_capture_moves_no_state() -> None:
    """It may be in vain on another rank, and the step is run again."""
    seen: list[list[int]] = []

    def forward(batch: ForwardBatch) -> Tensor:
        assert batch.state_slots is not None
        seen.append(batch.state_slots.tolist())
        return torch.zeros(len(batch.tokens), 8)

    options = {"page_size": 16, "vocabulary": 8, "device": torch.device("cpu")}
    graphs = StepGraphs(forward, StandInRecorder(watches=False), 4, context=32, states=True, **options)
    batch = chunk_batch([([1], 3, [0]), ([2], 5, [1])], state_slots=[3, 1])
    assert graphs.capture(batch, (2, 32)) is None and seen == [[-1, -1]]
    assert graphs.replay(batch, (2, 32)).shape == (2, 8) and seen[1:] == [[3, 1]]


def test_prefixes_are_not_shared(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lowbit"):
        engine = engine_of(model)
    assert "prefixes are not shared: the state of a recurrent layer" in caplog.text
    prompt = list(range(60))
    first, second = answers(engine, [prompt]), answers(engine, [prompt])
    assert first == second and engine.status().cached_prompt_tokens == 0
    assert engine.status().pages_cached == 0


def test_drafts_are_refused(model: Model) -> None:
    with pytest.raises(LowbitError, match="a wrong draft would change their state for good") as caught:
        engine_of(model, speculative_algorithm="NGRAM")
    assert caught.value.code == "E0105"


def test_states_are_counted_before_pages(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    each = state_bytes(model.cache_specs())
    assert each == 4 * 4 * ((2 * 2 * 24 + 6 * 80) * 3 + 6 * 24 * 80)
    page = 16 * sum(spec.token_bytes() for spec in model.cache_specs())
    monkeypatch.setattr("lowbit.engine.memory.free_memory", lambda device, mapped=0: 200 * each)

    def pages(running: int, **options: object) -> int:
        values = {"device": "cpu", "max_running_requests": running, "mem_fraction_static": 0.5, **options}
        return pool_pages(model, Settings(**values))

    assert pages(98) == each // page
    with pytest.raises(LowbitError, match="--max-running-requests 99 needs .*: use 49 or fewer") as caught:
        pages(99)
    assert caught.value.code == "E0502" and "\n" not in str(caught.value)
    with pytest.raises(LowbitError, match="of KV cache, .* for states of 98 sequences"):
        pages(98, max_total_tokens=10**9)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_step_without_memory_starts_its_sequences_again(
    failures: int, folder: Path, given: list[list[int]]
) -> None:
    """States of some layers have moved on when a step fails: they must not go on from there."""
    model = load_model(open_checkpoint(str(folder)), device="cpu")
    expected = [answers(engine_of(model), [prompt])[0] for prompt in given[:5]]
    engine, left = engine_of(model, ForcedModes(chunk=16), disable_cuda_graph=True), [0]
    forward = model.forward

    def breaking(batch: object, caches: list) -> Tensor:
        logits = forward(batch, caches)
        if left[0] and engine.status().steps >= 6:
            left[0] -= 1
            raise torch.OutOfMemoryError("no memory")
        return logits

    left[0] = failures
    model.forward = breaking  # type: ignore[method-assign]
    tokens: dict[str, list[int]] = {}
    failed = set()
    for number, prompt in enumerate(given[:5]):
        engine.submit(make_request(prompt, NEW_TOKENS, id=str(number), ignore_eos=True))
    while engine.has_work():
        for event in engine.step():
            tokens.setdefault(event.id, []).extend(event.tokens)
            failed |= {event.id} if event.finish_reason == "error" else set()
        assert engine.check() == []
    assert left[0] == 0 and len(failed) == failures - 1
    for number, answer in enumerate(expected):
        assert str(number) in failed or tokens[str(number)] == answer
