"""A request's logits are bit-equal alone and in any company (docs/architecture.md, "Sameness").

Prompts of 1 to 700 tokens on the embedded model, each run alone on a fresh engine without a prefix cache,
then together: random arrivals, up to 32 at once, a pool too small for all of them (retraction and eviction),
prompts that share prefixes, odd chunk sizes. Every sampled row's logits are hashed with the position and
token they follow; a single differing bit anywhere makes an unknown hash. 64 prompts are marked slow; 16, of
which one is long, meet all of this too (each case asserts it), and quantized KV caches go through the hardest
case with 8 or 10.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor

from lowbit.checkpoint import open_checkpoint
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams, TokenEvent
from lowbit.engine.scheduler import Chunk
from lowbit.kernels import native
from lowbit.loading import load_model
from lowbit.models.model import Model
from lowbit.settings import Settings
from lowbit.tokenization import load_tokenizer

NEW_TOKENS = 6
PROMPTS = {"auto": 16, "many": 64, "int8": 10, "int4": 8}  # by type of the KV cache; many: as auto
LENGTHS = {"auto": 200, "many": 700, "int8": 700, "int4": 200}  # at most, but for one prompt of 700 tokens
LEAST_BATCH = {"auto": 6, "many": 8, "int8": 4, "int4": 4}  # that must have run at once


class Recorder:
    """Remembers a hash of every row of logits an engine's runner gave, captured steps included."""

    def __init__(self, engine: Engine) -> None:
        self.seen: set[tuple[int, int, bytes]] = set()
        self.largest_batch = 0
        self._forward = engine._runner.forward
        engine._runner.forward = self._watched  # type: ignore[method-assign]

    def _watched(
        self, chunks: list[Chunk], rows: list[int], chosen: Tensor | None, *, greedy: bool = False
    ) -> Tensor:
        logits = self._forward(chunks, rows, chosen, greedy=greedy)
        self.largest_batch = max(self.largest_batch, len(chunks))
        places = [
            (position, chunk.sequence.tokens[position])
            for chunk in chunks
            for position in range(chunk.sequence.computed, chunk.sequence.computed + chunk.count)
        ]
        for row, values in zip(rows, logits, strict=True):
            digest = hashlib.sha256(values.contiguous().numpy().tobytes()).digest()
            self.seen.add((*places[row], digest))
        return logits


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in ("many", "int8") else []) for name in PROMPTS
    ],
)
def cache_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(cache_type: str) -> Model:
    kind = "auto" if cache_type == "many" else cache_type
    return load_model(open_checkpoint("smollm2"), device="cpu", kv_cache_dtype=kind)


def prompts(cache_type: str) -> list[tuple[int, ...]]:
    """Lengths log-uniform; every third prompt continues an earlier one."""
    draw, most = random.Random(20), LENGTHS[cache_type]
    made: list[tuple[int, ...]] = []
    for index in range(PROMPTS[cache_type]):
        length = 700 if index == 5 else max(1, int(most ** draw.random()))
        prompt = [draw.randrange(20, 49000) for _ in range(length)]
        if index % 3 == 2:
            prompt = (list(draw.choice(made)) + prompt)[: 700 if index == 5 else most]
        made.append(tuple(prompt))
    return made


def request(index: int, prompt: tuple[int, ...]) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return Request(id=str(index), prompt=prompt, sampling=sampling)


def settings(**changes: object) -> Settings:
    # A step at a time: the recorder sees each one's logits.
    alone = {"device": "cpu", "max_running_requests": 32, "num_continuous_decode_steps": 1}
    return Settings(**{**alone, **changes})


def collect(events: list[TokenEvent], tokens: dict[str, list[int]]) -> None:
    for event in events:
        assert event.finish_reason != "error", event.error
        tokens.setdefault(event.id, []).extend(event.tokens)


@pytest.fixture(scope="module")
def alone(model: Model, cache_type: str) -> Iterator[tuple[Recorder, dict[str, list[int]]]]:
    """Every prompt by itself: one prefill, then decode steps of one row, all but the first captured.

    In company most steps hold a part of a prompt, and run eagerly.
    """
    tokens: dict[str, list[int]] = {}
    tokenizer = load_tokenizer(open_checkpoint("smollm2"))
    whole = settings(disable_radix_cache=True, chunked_prefill_size=1024, max_total_tokens=1024)
    engine = Engine(model, tokenizer, whole)
    recorder = Recorder(engine)
    for index, prompt in enumerate(prompts(cache_type)):
        engine.submit(request(index, prompt))
        while engine.has_work():
            collect(engine.step(), tokens)
    assert recorder.largest_batch == 1
    assert native.library() is None or engine.status().captured_steps >= PROMPTS[cache_type] * (
        NEW_TOKENS - 2
    )
    yield recorder, tokens


CASES = {
    "roomy": (settings(max_total_tokens=16384), ForcedModes(), 2),
    "small pool, odd chunks, one thread": (
        settings(max_total_tokens=800, chunked_prefill_size=173),
        ForcedModes(retract_every=7),
        1,
    ),
    "everything evicted, tiny chunks": (
        settings(max_total_tokens=4800, chunked_prefill_size=512),
        ForcedModes(retract_every=5, evict_always=True, chunk=61),
        2,
    ),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_logits_do_not_depend_on_company(
    case: str, cache_type: str, model: Model, alone: tuple[Recorder, dict[str, list[int]]]
) -> None:
    if cache_type not in ("auto", "many") and "tiny chunks" not in case:
        pytest.skip("the hardest case will do")
    expected, expected_tokens = alone
    chosen, forced, threads = CASES[case]
    if cache_type == "many" and case.startswith("small pool"):  # 8 of its longer prompts do not fit there
        chosen = replace(chosen, max_total_tokens=1600)
    tokens: dict[str, list[int]] = {}
    engine = Engine(model, load_tokenizer(open_checkpoint("smollm2")), chosen, forced=forced)
    recorder = Recorder(engine)
    native.set_threads(threads)
    try:
        draw = random.Random(21)
        waiting = list(enumerate(prompts(cache_type)))
        draw.shuffle(waiting)
        while waiting or engine.has_work():
            for _ in range(draw.choice((0, 1, 2, 8))):
                if waiting:
                    engine.submit(request(*waiting.pop()))
            collect(engine.step(), tokens)
            assert engine.check() == []
    finally:
        native.set_threads(2)
    assert recorder.largest_batch >= LEAST_BATCH[cache_type]
    assert tokens == expected_tokens
    assert recorder.seen <= expected.seen, "a row of logits differs from the same row computed alone"
    status = engine.status()
    assert forced.evict_always or status.cached_prompt_tokens > 0, "no prefix was shared"
    assert not forced.retract_every or status.preemptions > 0, "nothing was retracted"
