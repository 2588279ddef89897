"""How many pages a GPU gets, and what happens in a step that finds no memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.stand_in import StandIn, continuation
from engine.test_engine import make_engine, make_request, prompts, run, tokens_of, use_reference
from lowbit.engine import load as load_module
from lowbit.engine import memory
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.memory import pool_pages, prefill_tokens, running_requests, workspace
from lowbit.engine.scheduler import Chunk
from lowbit.errors import LowbitError
from lowbit.settings import Settings

GIB = 1 << 30
PAGE_BYTES = 16 * 131072  # Llama 3.1 8B: 128 KiB a token
LLAMA = SimpleNamespace(
    hidden_size=4096, heads=32, kv_heads=8, head_dim=128, intermediate_size=14336, moe=None
)


class OnGpu:
    """As much of a model as pages are counted by."""

    device = torch.device("cuda")
    context_length = 131072
    vocab_size = 128256
    config = LLAMA
    kernels: frozenset[str] = frozenset()
    others = ()

    def cache_specs(self) -> list[object]:
        """A page of 2 MiB."""
        return [SimpleNamespace(token_bytes=lambda: 131072)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """A GPU of so many GiB of which so many are free."""

    def set_memory(total: float, free: float) -> None:
        monkeypatch.setattr(memory, "total_memory", lambda device: int(total * GIB))
        monkeypatch.setattr(memory, "free_memory", lambda device: int(free * GIB))

    return set_memory


def pages(**options: object) -> int:
    return pool_pages(OnGpu(), Settings(**options))  # type: ignore[arg-type]


def test_the_fraction_is_of_all_memory_weights_included(gpu: Callable[[float, float], None]) -> None:
    gpu(80, 64)  # 16 GiB of weights
    assert pages(mem_fraction_static=0.9) == (64 - 8) * GIB // PAGE_BYTES
    assert pages() == (64 - 12) * GIB // PAGE_BYTES, "0.85"
    assert pages(mem_fraction_static=0.5) == 24 * GIB // PAGE_BYTES
    gpu(80, 40)  # somebody else has 24
    assert pages(mem_fraction_static=0.9) == 32 * GIB // PAGE_BYTES
    gpu(80, 64)
    assert pages(context_length=1024, max_running_requests=3) == 3 * 64, "no more than can be used"


def test_the_largest_step_has_its_room_whatever_the_fraction(gpu: Callable[[float, float], None]) -> None:
    gpu(24, 8)
    step = workspace(OnGpu(), Settings())  # type: ignore[arg-type]
    assert 0.5 * GIB < step < 1.5 * GIB
    assert pages(mem_fraction_static=0.95) == (8 * GIB - max(step, int(1.2 * GIB))) // PAGE_BYTES
    larger = workspace(OnGpu(), Settings(chunked_prefill_size=16384))  # type: ignore[arg-type]
    assert larger > step + 15000 * 4 * (3 * 14336 + 3 * 4096)
    assert pages(mem_fraction_static=0.95, chunked_prefill_size=16384) == (8 * GIB - larger) // PAGE_BYTES
    whole = workspace(OnGpu(), Settings(chunked_prefill_size=-1, context_length=16384))  # type: ignore[arg-type]
    assert whole == larger
    reference = OnGpu()
    reference.kernels = frozenset({"reference"})
    assert workspace(reference, Settings()) > step  # type: ignore[arg-type]


def test_a_gpu_computes_more_of_a_prompt_at_once(gpu: Callable[[float, float], None]) -> None:
    """Its products wait for arithmetic then, not for memory or for who launches them."""
    found = []
    for total in (16, 24, 40, 80, 141):
        gpu(total, total / 2)
        found.append(prefill_tokens(Settings(), OnGpu().device))
    assert found == [2048, 2048, 4096, 8192, 8192]
    assert prefill_tokens(Settings(), torch.device("cpu")) == 512
    assert prefill_tokens(Settings(chunked_prefill_size=64), OnGpu().device) == 64


def test_a_gpu_runs_more_sequences(gpu: Callable[[float, float], None]) -> None:
    """But where it would keep large states for each."""
    found = []
    for total in (16, 24, 40, 80, 141):
        gpu(total, total / 2)
        found.append(running_requests(Settings(), OnGpu().device, states=False))
    assert found == [64, 64, 128, 256, 256]
    assert running_requests(Settings(), OnGpu().device, states=True) == 64
    assert running_requests(Settings(), torch.device("cpu"), states=False) == 64
    assert running_requests(Settings(max_running_requests=7), OnGpu().device, states=False) == 7


@pytest.mark.parametrize(
    ("free", "options", "words"),
    [
        (20, {"context_length": 131072}, ["--context-length 131072 needs 16.0 GiB", "largest that fits is"]),
        (
            20,
            {"max_total_tokens": 200000},
            ["--max-total-tokens 200000 needs 24.4 GiB", "the most that fits"],
        ),
        (5, {"mem_fraction_static": 0.5}, ["one KV page needs 2097152 bytes", "--chunked-prefill-size"]),
    ],
)
def test_errors_name_numbers_and_ways_out(
    free: float, options: dict[str, object], words: list[str], gpu: Callable[[float, float], None]
) -> None:
    gpu(40, free)
    with pytest.raises(LowbitError) as caught:
        pages(**options)
    assert caught.value.code == "E0502"
    fraction = options.get("mem_fraction_static", 0.85)
    origin = [f"{free:.1f} of the GPU's 40.0 GiB are free", f"--mem-fraction-static is {fraction:g}"]
    for word in [*words, *origin, "for a step of 4160 tokens"]:
        assert word in caught.value.message


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, embedded_path: object) -> None:
    monkeypatch.setattr(load_module, "total_memory", lambda device: 24 * GIB)
    monkeypatch.setattr(load_module, "free_memory", lambda device: GIB // 2)

    def fails(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total …")

    monkeypatch.setattr("lowbit.loading.load_model", fails)
    with pytest.raises(LowbitError) as caught:
        load_module.load_engine(Settings(model=str(embedded_path), device="cpu"))
    assert caught.value.code == "E0503"
    assert "0.5 of the GPU's 24.0 GiB" in caught.value.message
    assert "(CUDA out of memory)" in caught.value.message


# ---- before it is needed -------------------------------------------------------------------------------


def test_a_server_claims_the_memory_of_a_first_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the numbers of a step need; no answer changes by it."""
    monkeypatch.setattr(memory, "_token_bytes", lambda config: 1 << 16)
    monkeypatch.setattr(memory, "_keep_freed", lambda: True)  # of this process, for good
    engine = make_engine(chunked_prefill_size=100)
    assert sum(1 for _ in engine.claim_scratch()) == -(-(100 << 16) // memory._CLAIMED)
    (events,) = run(engine, make_request([5, 6, 7]))
    assert tokens_of(events) == continuation([5, 6, 7], 8)


def test_scratch_is_claimed_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_token_bytes", lambda config: 1 << 30)
    monkeypatch.setattr(memory, "_keep_freed", lambda: True)
    model = SimpleNamespace(device=torch.device("cpu"), config=LLAMA)
    assert sum(1 for _ in memory.claim_scratch(model, 512)) * memory._CLAIMED == memory._MOST_SCRATCH
    assert not list(memory.claim_scratch(SimpleNamespace(device=torch.device("cuda")), 512))
    monkeypatch.setattr(memory, "_keep_freed", lambda: False)  # what is freed would go back at once
    assert not list(memory.claim_scratch(model, 512))


# ---- in a step -----------------------------------------------------------------------------------------


class Small:
    """An engine whose steps fail where ``too_large`` says so, after they have written what they would."""

    def __init__(self, engine: Engine, too_large: Callable[[list[Chunk]], bool]) -> None:
        self.failures = 0
        self._too_large = too_large
        self._forward = engine._runner.forward
        engine._runner.forward = self._limited  # type: ignore[method-assign]

    def _limited(
        self, chunks: list[Chunk], rows: list[int], chosen: Tensor | None, *, greedy: bool = False
    ) -> Tensor:
        logits = self._forward(chunks, rows, chosen, greedy=greedy)
        if self._too_large(chunks):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")
        return logits


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    use_reference(monkeypatch)


MODES = pytest.mark.parametrize(
    "forced",
    [ForcedModes(), ForcedModes(on_device=True), ForcedModes(overlap=True)],
    ids=["", "device", "overlap"],
)


@MODES
def test_a_step_that_fails_once_is_taken_again_smaller(
    forced: ForcedModes, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(forced, chunked_prefill_size=64)
    small = Small(engine, lambda chunks: engine.status().steps == 4 and small.failures == 0)
    listed = prompts(8, seed=4)
    for prompt, events in zip(listed, run(engine, *(make_request(p, 12) for p in listed)), strict=True):
        assert tokens_of(events) == continuation(prompt, 12)
    assert small.failures == 1 and engine.status().preemptions == 1
    assert engine._scheduler.prefill_budget == 32
    (line,) = [record.message for record in caplog.records if "out of memory" in record.message]
    assert "Tried to allocate 2.00 GiB.; from now on steps have at most 32 prompt tokens" in line


@MODES
def test_steps_shrink_until_they_fit(forced: ForcedModes) -> None:
    engine = make_engine(forced, chunked_prefill_size=256, max_running_requests=8)

    def too_large(chunks: list[Chunk]) -> bool:
        return sum(chunk.count for chunk in chunks) > 40 or len(chunks) > 3

    small = Small(engine, too_large)
    listed = prompts(10, seed=5)
    ended = run(engine, *(make_request(p, 10) for p in listed))
    right = [
        tokens_of(events) == continuation(prompt, 10) for prompt, events in zip(listed, ended, strict=True)
    ]
    failed = [events[-1].error_code == "out_of_memory" for events in ended]
    assert all(a or b for a, b in zip(right, failed, strict=True))
    assert sum(failed) < 5 and engine._scheduler.prefill_budget <= 40
    before = small.failures
    for prompt, events in zip(listed, run(engine, *(make_request(p, 10) for p in listed)), strict=True):
        assert tokens_of(events) == continuation(prompt, 10), "the engine has learnt its size"
    assert small.failures <= before + 3


@MODES
def test_a_request_that_never_fits_ends_alone(forced: ForcedModes) -> None:
    engine = make_engine(forced)
    Small(engine, lambda chunks: any(61 in chunk.sequence.request.prompt for chunk in chunks))
    good, bad = prompts(3, seed=6, longest=20), [61, 5, 6]
    good = [[token % 60 for token in prompt] for prompt in good]
    *fine, wrong = run(engine, *(make_request(p, 12) for p in good), make_request(bad, 12))
    for prompt, events in zip(good, fine, strict=True):
        assert tokens_of(events) == continuation(prompt, 12)
    last = wrong[-1]
    assert (last.finish_reason, last.error_code) == ("error", "out_of_memory")
    assert "twice: CUDA out of memory" in last.error and "--mem-fraction-static" in last.error
    (again,) = run(engine, make_request(good[0], 12))
    assert tokens_of(again) == continuation(good[0], 12)


def test_drafts_of_a_step_that_failed_leave_no_pages_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    from engine.stand_in import next_copied

    model = StandIn(next_copied)
    engine = make_engine(ForcedModes(), model, speculative_algorithm="NGRAM", max_total_tokens=2000)
    small = Small(engine, lambda chunks: sum(len(c.drafts) for c in chunks) > 3 and small.failures < 2)
    listed = prompts(3, seed=7, longest=20)
    plain = run(
        make_engine(ForcedModes(), StandIn(next_copied), max_total_tokens=2000),
        *(make_request(p, 80, ignore_eos=True) for p in listed),
    )
    found = run(engine, *(make_request(p, 80, ignore_eos=True) for p in listed))
    assert small.failures == 2
    assert [tokens_of(events) for events in found] == [tokens_of(events) for events in plain]
