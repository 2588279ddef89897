"""Graphs and overlapping steps of two ranks, with a stand-in for CUDA's graphs on each: the same answers as
one process gives, also where a rank finds no memory or cannot capture; E0712 where one ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine import rank_stand_in
from engine.test_overlap import Watched
from engine.test_ranks import folder, ranks_of, save_letters
from lowbit import LLM, LowbitError, SamplingParams
from lowbit.engine.choices import wait_for
from lowbit.kernels import parallel
from lowbit.kernels.forward_batch import ForwardBatch
from models.test_qwen_next import make_checkpoint

__all__ = ["folder"]

FREE = [[5, 9, 2, 40, 7], [8] * 30, [1, 2], [11, 12, 13, 60] * 3, [70]]
OPTIONS = {"max_total_tokens": 1024, "max_running_requests": 8, "device": "cpu"}
Start = Callable[..., LLM]


def answers(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Some greedy, some sampled, of different lengths, so that steps have 1 to 5 sequences."""
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=index % 2 * 0.8, max_tokens=4 + 4 * index, seed=index, ignore_eos=True
        )
        llm._submit(prompt, sampling)
    found: dict[str, list[int]] = {}
    while llm._engine.has_work():
        for event in llm._engine.step():
            assert event.finish_reason != "error", event.error
            found.setdefault(event.id, []).extend(event.tokens)
    return [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("-")[2]))]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS) as llm:
        yield llm


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Two ranks with stand-ins; graphs of 1, 2 and 4 sequences."""
    started: list[LLM] = []

    def make(
        attention: str, *, overlap: bool = False, captures: str = "", folder: Path = folder, **options: object
    ) -> LLM:
        monkeypatch.setenv("RANK_ATTENTION", attention)
        monkeypatch.setenv("RANK_CAPTURES", captures)
        monkeypatch.setenv("LOWBIT_TEST_OVERLAP", str(int(overlap)))
        monkeypatch.setattr("lowbit.engine.rank_process.RANK_MODULE", "engine.rank_stand_in")
        rank_stand_in.install(monkeypatch.setattr, rank_stand_in.STARVES_FIRST)
        started.append(LLM(str(folder), tp_size=2, **{"cuda_graph_bs": "1 2 4", **OPTIONS, **options}))
        started[-1]._engine.prepare()
        return started[-1]

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)
    for llm in started:
        llm.close()


def replays(llm: LLM) -> int:
    return llm._engine.status().captured_steps


def test_padded_graphs_with_a_step_in_flight(
    alone: LLM, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    llm = start("padded", overlap=True)
    runner, ranks = llm._engine._runner, ranks_of(llm)
    assert [rows for rows, _ in runner._capture.sizes] == [4, 2, 1]  # type: ignore[union-attr]
    watched = Watched(llm._engine)
    assert answers(llm, FREE) == answers(alone, FREE)
    assert replays(llm) > 8 and watched.ahead > 15
    # Rank 1 finds no memory for a prompt, in the middle of it, with a step in flight or none.
    before = replays(llm)
    starving = [*FREE[:2], [rank_stand_in.STARVES_OTHERS] * 7, FREE[4]]
    assert answers(llm, starving) == answers(alone, starving)
    [line] = [record.message for record in caplog.records if "out of memory in a step" in record.message]
    assert "rank 1 of 2" in line and "as asked for" in line and ranks._groups == 1
    assert replays(llm) > before, "graphs were captured again, for the new group"
    # It is killed while steps are replayed.
    events = llm.stream(FREE[0], SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    for _ in range(5):
        next(events)
    before = replays(llm)
    next(events)
    assert replays(llm) > before
    os.kill(ranks._others[0].child.pid, signal.SIGKILL)
    with pytest.raises(LowbitError, match=r"rank 1 of 2 \(process \d+\) ended with SIGKILL") as caught:
        list(events)
    assert caught.value.code == "E0712"


def test_exact_sizes_and_rank_0_without_memory(
    alone: LLM, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    llm = start("exact")
    assert answers(llm, FREE) == answers(alone, FREE)
    assert 3 in {rows for rows, _ in llm._engine._runner._capture.sizes}  # type: ignore[union-attr]
    before = replays(llm)
    assert before > 0
    starving = [*FREE[:2], [rank_stand_in.STARVES_FIRST] * 7, FREE[4]]
    assert answers(llm, starving) == answers(alone, starving)
    assert "out of memory in a step" in caplog.text and ranks_of(llm)._groups == 1
    assert replays(llm) > before


def test_one_rank_that_cannot_capture(alone: LLM, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    llm = start("padded", captures="ok memory waits")
    assert "no memory for a CUDA graph of 2 sequences" in caplog.text
    [line] = [record.message for record in caplog.records if "CUDA graphs off" in record.message]
    assert "rank 1 of 2" in line and "synchronizing" in line and ranks_of(llm)._groups == 2
    assert answers(llm, FREE[:3]) == answers(alone, FREE[:3])
    assert replays(llm) == 0
    # What is no lack of memory ends all, with the rank's own words.
    with pytest.raises(LowbitError, match=r"rank 1 of 2: models\.language_model.*broken, as asked") as caught:
        llm.generate([[rank_stand_in.BREAKS] * 9], SamplingParams(temperature=0.0, max_tokens=2))
    assert caught.value.code == "E0712"


def test_states_move_on_once_where_a_capture_fails_late(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 has its graph when rank 1 finds no memory for its own: the step is run again, eagerly."""
    make_checkpoint(tmp_path, eos_token_id=None)
    save_letters(tmp_path)
    with LLM(str(tmp_path), **OPTIONS) as one:
        wanted = answers(one, FREE)
    llm = start("exact", captures="ok late", folder=tmp_path)
    assert answers(llm, FREE) == wanted
    assert "no memory for a CUDA graph of" in caplog.text and ranks_of(llm)._groups == 1
    assert replays(llm) > 0


def test_steps_that_are_nobodys_leave_states_of_delayed_scales(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All ranks put theirs back: one that did not would round its inputs by other scales. One of the steps
    finds no memory on the other rank, whose states have noted half of it."""
    delayed = {"quantization": "fp8:activation=delayed,history=4", "disable_cuda_graph": True}
    sampling = SamplingParams(temperature=0.0, max_tokens=4, logprobs=4, ignore_eos=True)
    fresh = start("padded", **delayed)
    wanted = fresh.generate(FREE[0], sampling)
    runner, ranks, states = fresh._engine._runner, ranks_of(fresh), fresh._engine.model.states
    served = states.state_dict()
    with fresh._engine.model.kept_states():  # type: ignore[attr-defined]
        runner._launch_all([(3, 1)], None)
        moved = states.state_dict()
    assert any(not torch.equal(served[name], moved[name]) for name in served), "by these steps, too"
    assert all(torch.equal(served[name], back) for name, back in states.state_dict().items())
    fresh.close()

    warmed = start("padded", **delayed)
    runner, ranks = warmed._engine._runner, ranks_of(warmed)
    nobodys = runner._nobodys

    def starving(tokens: int, sequences: int, context: int) -> ForwardBatch:
        batch = nobodys(tokens, sequences, context)
        batch.tokens.fill_(rank_stand_in.STARVES_OTHERS)
        return batch

    runner._nobodys = starving  # type: ignore[method-assign]
    runner.warm_up([(5, 1), (9, 1), (3, 2)])
    assert "no memory for a step of 9 tokens" in caplog.text and ranks._groups == 1
    found = warmed.generate(FREE[0], sampling)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert [one.logprobs for one in found] == [one.logprobs for one in wanted], "to the last bit"


def test_steps_before_the_one_that_failed_stay_whole() -> None:
    """A GPU may still be at them: a group is left when what it exchanged for them is done."""
    did: list[str] = []

    class Exchange:
        def abort(self) -> None:
            did.append("abort")

    class Event:
        def synchronize(self) -> None:
            did.append("wait")

        def record(self) -> None:
            did.append("record")

    group = parallel._Group(torch.device("cuda", 1), 1.0, Exchange(), Event())  # type: ignore[arg-type]
    rank = parallel.Parallel(1, 2, group)
    rank.begin_step()
    rank.leave()
    rank.leave()
    assert did == ["record", "wait", "abort"]
    with pytest.raises(RuntimeError, match="rank 1 of 2 is in no group"):
        rank.gather(torch.ones(1))
    group.now = Exchange()
    rank.close()
    assert did[3:] == ["abort"], "at the end nothing is waited for: the other ranks may be gone"


def test_a_device_that_will_never_be_done_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sums with a rank that is gone."""
    monkeypatch.setattr("lowbit.engine.choices._WATCH_SECONDS", 0.0)
    asked: list[str] = []

    class Never:
        def query(self) -> bool:
            asked.append("query")
            return False

        def synchronize(self) -> None:
            asked.append("synchronize")

    def watch() -> None:
        if len(asked) == 3:
            raise LowbitError("E0712", "rank 1 of 2 ended")

    with pytest.raises(LowbitError, match="rank 1"):
        wait_for(Never(), watch)
    wait_for(Never(), None)
    assert asked == ["query"] * 3 + ["synchronize"]
