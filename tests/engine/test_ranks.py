"""The processes of --tp-size: the same answers, clean ends, and what is said when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.stand_in import StandIn
from forward_helpers import chunk_batch
from lowbit import LLM, LowbitError, SamplingParams
from lowbit.engine.memory import pool_pages
from lowbit.engine.rank_messages import RankReady, Step, batch_of, numbers_of, packed, step_of
from lowbit.engine.rank_process import check_devices, device_of
from lowbit.engine.ranks import Ranks
from lowbit.engine.wire import FrameDecoder, encode_frames
from lowbit.kernels.recurrent import LayerSpec, StateSpec, state_bytes
from lowbit.settings import Settings
from models.family_cases import SIZES, saved
from models.test_qwen_next import make_checkpoint
from server.harness import alive, http, wait_until
from server.test_end_to_end import Served

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
PROMPTS = [[5, 9, 2, 40, 7], [8] * 30, [1, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32, with one token a letter."""
    made = tmp_path_factory.mktemp("tiny")
    saved("Llama", made, **{**SIZES, "num_hidden_layers": 2, "eos_token_id": None})
    save_letters(made)
    return made


def save_letters(folder: Path) -> None:
    vocabulary = {chr(code): code for code in range(32, 127)} | {"?": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


def ranks_of(llm: LLM) -> Ranks:
    found = llm._engine.model.ranks  # type: ignore[attr-defined]
    assert isinstance(found, Ranks)
    return found


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), tp_size=2, max_total_tokens=1024) as llm:
        yield llm


def test_answers_are_those_of_one_process(folder: Path, shared: LLM) -> None:
    with LLM(str(folder), max_total_tokens=1024) as alone:
        wanted = alone.generate(PROMPTS, GREEDY)
        whole = alone._engine.ready().weight_bytes
    found = shared.generate(PROMPTS, GREEDY)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.token == theirs.token and mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert shared.generate(PROMPTS, GREEDY)[0].tokens == wanted[0].tokens, "now from the prefix cache"
    ready = shared._engine.ready()
    assert whole <= ready.weight_bytes <= 1.1 * whole and ready.details["device"] == "cpu, 2 ranks"
    assert shared._engine.status().captured_steps == 0, "no graphs on a CPU, and no plans of native calls"


def test_recurrent_layers_answer_as_in_one_process(tmp_path: Path) -> None:
    """Three slots for five sequences in chunks of 7 tokens: slots change hands, and some begin again."""
    make_checkpoint(tmp_path, eos_token_id=None)
    save_letters(tmp_path)
    options = {"max_total_tokens": 96, "max_running_requests": 3, "chunked_prefill_size": 7}
    given = [*PROMPTS, [9, 8, 7] * 5, [77]]
    sampling = msgspec.structs.replace(GREEDY, max_tokens=24, ignore_eos=True)
    with LLM(str(tmp_path), **options) as alone:
        wanted = alone.generate(given, sampling)
    with LLM(str(tmp_path), tp_size=2, **options) as llm:
        found = llm.generate(given, sampling)
        assert llm._engine.status().preemptions > 0
        [other] = llm._engine.model.others  # type: ignore[attr-defined]
        assert other.state_bytes == state_bytes(llm._engine.model.cache_specs()) > 0
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    for one, two in zip(found, wanted, strict=True):
        for mine, theirs in zip(one.logprobs, two.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_rank_that_is_killed_ends_the_request_with_its_name(folder: Path) -> None:
    with LLM(str(folder), tp_size=2, max_total_tokens=1024) as llm:
        [other] = ranks_of(llm)._others
        events = llm.stream(PROMPTS[0], msgspec.structs.replace(GREEDY, max_tokens=500))
        next(events)
        os.kill(other.child.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LowbitError, match=r"rank 1 of 2 \(process \d+\) ended with SIGKILL") as caught:
            list(events)
        assert caught.value.code == "E0712" and time.monotonic() - began < 20
        with pytest.raises(LowbitError, match="rank 1 of 2"):
            llm._engine.check()
    assert not alive(other.child.pid), "nothing is left behind"


def test_closing_ends_every_rank(shared: LLM) -> None:
    """Stands last of those that use it."""
    [other] = ranks_of(shared)._others
    pid = other.child.pid
    assert alive(pid)
    shared.close()
    assert not alive(pid) and other.child.returncode == 0


def test_what_a_rank_cannot_load_is_said_once(folder: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(LowbitError, match="4 heads with 2 K/V heads .* what works: 1, 2, 4") as caught:
        LLM(str(folder), tp_size=3)
    assert caught.value.code == "E0430" and time.monotonic() - began < 60


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(Settings(tp_size=2))
    check_devices(Settings(tp_size=3, device="cpu"))
    assert device_of(Settings(tp_size=2), 1) == torch.device("cuda", 1)
    with pytest.raises(LowbitError, match="torch sees 2 CUDA devices.*--tp-size 2 or less") as caught:
        check_devices(Settings(tp_size=3))
    assert caught.value.code == "E0433"


@pytest.mark.parametrize("slots", [None, [7, 2]])
def test_a_batch_as_it_is_sent(slots: list[int] | None) -> None:
    sequences = [([5, 6, 7], 0, [3]), ([9], 20, [1, 4])]
    batch = chunk_batch(sequences, sample_all=False, state_slots=slots)
    if slots is not None:
        batch.host_lengths = batch.query_lengths.numpy(), batch.context_lengths.numpy()
    step = step_of(batch, (4, 64), capture=True)
    [received] = FrameDecoder(Step).feed(encode_frames([step]))
    assert received == step and numbers_of(received) == len(packed(step, batch))
    assert received.graph == (4, 64) and received.capture
    again = batch_of(received, packed(step, batch))
    names = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert len(names) == 7 + (slots is not None)
    for name in names:
        mine, theirs = getattr(again, name), getattr(batch, name)
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype and mine.is_contiguous()
        assert mine.data_ptr() % 4 == 0
    if batch.host_lengths is None:
        assert again.state_slots is None and again.host_lengths is None
    else:
        assert again.host_lengths is not None
        for one, other in zip(again.host_lengths, batch.host_lengths, strict=True):
            assert one.dtype == other.dtype and one.tolist() == other.tolist()
    assert (again.page_size, again.max_query, again.max_context) == (16, 3, 21)


def test_pages_are_counted_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = "lowbit.engine.memory"
    monkeypatch.setattr(f"{memory}.free_memory", lambda device, mapped=0: 1 << 20)
    monkeypatch.setattr(f"{memory}.total_memory", lambda device: 0)
    monkeypatch.setattr(f"{memory}.workspace", lambda model, settings: 0)
    settings = Settings(mem_fraction_static=0.5, max_running_requests=1 << 20)
    alone = StandIn()
    own = sum(spec.token_bytes() for spec in alone.cache_specs())
    shared = StandIn()
    shared.others = [RankReady(3 * own, 0, 1, 0)]  # type: ignore[attr-defined]
    assert pool_pages(shared, settings) == pool_pages(alone, settings) // 4, "memory is one on a CPU"
    alone.device = shared.device = torch.device("cuda")
    free = (1 << 18, 1 << 21)
    shared.others = [RankReady(own, 0, each, 0) for each in free]  # type: ignore[attr-defined]
    assert pool_pages(shared, settings) == pool_pages(alone, settings) // 4, "each has its own on GPUs"


def test_states_are_counted_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recurrent(StandIn):
        """An attention layer, and one with a state of 1,024 bytes here."""

        def cache_specs(self) -> list[LayerSpec]:  # type: ignore[override]
            return [*super().cache_specs(), StateSpec(k_heads=1, heads=1, k_dim=8, v_dim=32, taps=1)]

    memory = "lowbit.engine.memory"
    monkeypatch.setattr(f"{memory}.free_memory", lambda device, mapped=0: 1 << 20)
    monkeypatch.setattr(f"{memory}.total_memory", lambda device: 0)
    monkeypatch.setattr(f"{memory}.workspace", lambda model, settings: 0)
    settings = Settings(mem_fraction_static=1.0, max_running_requests=63, context_length=1)
    model = Recurrent()
    own = sum(spec.token_bytes() for spec in model.cache_specs())
    most = {"max_total_tokens": 10**9}

    def room() -> int:
        """Bytes of this rank's pages."""
        with pytest.raises(LowbitError, match=r"the most that fits is \d+") as caught:
            pool_pages(model, replace(settings, **most))
        return int(caught.value.message.rpartition(" ")[2]) * own

    slots, page = 64, 16 * own
    assert (1 << 20) - slots * 1024 - room() < page
    model.others = [RankReady(own, 3 * 1024, 1, 0)]  # type: ignore[attr-defined]
    assert ((1 << 20) - 4 * slots * 1024) // 2 - room() < page, "memory is one on a CPU"
    model.device = torch.device("cuda")
    model.others = [RankReady(own, 3 * 1024, 1 << 20, 0)]  # type: ignore[attr-defined]
    assert (1 << 20) - 3 * slots * 1024 - room() < page, "the other GPU has more states than this one"


LEFT_ALONE = """
import os, sys, time
from lowbit import LLM
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tp_size=2, max_total_tokens=256)
    print(llm._engine.model.ranks._others[0].child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_rank_does_not_outlive_rank_0(folder: Path) -> None:
    command = [sys.executable, "-c", LEFT_ALONE, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as first:
        assert first.stdout is not None
        other = int(first.stdout.readline())
        assert alive(other)
        first.kill()
    wait_until(lambda: not alive(other), 10)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_server_starts_again_when_a_rank_dies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_MODEL", str(folder))
    monkeypatch.setenv("LOWBIT_TP_SIZE", "2")
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "model": folder.name}
    with LLM(str(folder), max_total_tokens=1024) as alone:
        [wanted] = alone.generate(PROMPTS[0], GREEDY)
    served = Served(tmp_path / "errors")
    try:
        wait_until(served.ready, 120)

        def answer() -> str:
            given = http.post(f"{served.url}/v1/completions", json=body, timeout=60)
            assert given.status_code == 200, given.text
            return str(given.json()["choices"][0]["text"])

        assert answer() == wanted.text
        engine = served.engine()
        [other] = children(engine)
        os.kill(other, signal.SIGKILL)  # while nothing is asked: it is seen all the same
        # The server may call itself ready for a moment after an engine's end.
        wait_until(lambda: '"engine ready", "restarts": 1' in served.errors.read_text(), 120)
        assert not alive(engine) and served.ready()
        assert answer() == wanted.text
        assert "rank 1 of 2" in served.errors.read_text()
        again = served.engine()
        [other] = children(again)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
        wait_until(lambda: not alive(again) and not alive(other), 10)
    finally:
        served.process.kill()
