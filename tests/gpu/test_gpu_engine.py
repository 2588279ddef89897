"""An engine whose attention, small operations and sampling are Triton's: padded graphs, overlapping steps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from checkpoint import tiny
from engine.graph_stand_in import StandInRecorder
from engine.stand_in import ByteTokenizer
from engine.test_choices import some_sampling
from engine.test_sampler import sequence
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.choices import Ask, DeviceSampler, HostChoices
from lowbit.engine.cuda_graphs import CudaRecorder, Recorder
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams
from lowbit.engine.sequence import Sequence
from lowbit.loading import load_model
from lowbit.settings import Settings


def recorder_for(device: torch.device) -> Recorder:
    """Real graphs where there are any."""
    return CudaRecorder(device) if device.type == "cuda" else StandInRecorder(watches=False)


def test_padded_graphs_and_overlap_change_no_token(device: torch.device, tmp_path: Path) -> None:
    tiny.write_folder(tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device=device.type, dtype="bfloat16")
    draw = random.Random(6)
    requests = []
    for index in range(4):
        prompt = tuple(draw.randrange(model.vocab_size) for _ in range(draw.randint(1, 20)))
        sampling = SamplingParams(
            temperature=index % 2 * 0.9, max_tokens=5, seed=index, ignore_eos=True, logprobs=index % 3 or None
        )
        requests.append(Request(id=str(index), prompt=prompt, sampling=sampling))
    found: list[dict[str, list[int]]] = []
    for graphs in (False, True):
        settings = Settings(
            device=device.type,
            max_total_tokens=320,
            max_running_requests=3,
            disable_cuda_graph=True,
            disable_overlap_schedule=not graphs,
        )
        forced = ForcedModes(on_device=True, overlap=graphs, check=True)
        engine = Engine(model, ByteTokenizer(), settings, forced=forced)
        assert {cache.kernel.name for cache in engine._runner._caches} == {"gpu"}
        if graphs:
            runner = engine._runner
            runner._capture = runner.graphs(recorder_for(device), (2, 4), engine.context_length)
            engine.prepare()
            assert len(runner._capture.sizes) == 2 and not runner._capture.refusal
        tokens: dict[str, list[int]] = {}
        for request in requests:
            engine.submit(request)
        while engine.has_work():
            for event in engine.step():
                assert event.finish_reason != "error", event.error
                tokens.setdefault(event.id, []).extend(event.tokens)
        found.append(tokens)
        assert engine.status().captured_steps >= (4 if graphs else 0)
    assert found[0] == found[1]
    assert all(len(listed) == 5 for listed in found[0].values())


def test_tokens_are_those_of_the_host(device: torch.device) -> None:
    """Steps of sequences with every kind of parameters; counts of penalties lie on the device."""
    draw = random.Random(5)
    generator = torch.Generator().manual_seed(4)
    running: list[Sequence] = []
    for _ in range(5):
        prompt = tuple(draw.randrange(300) for _ in range(draw.randint(1, 20)))
        running.append(sequence(prompt, **some_sampling(draw)))
    sampler = DeviceSampler(300, device)
    for _ in range(3):
        logits = torch.randn(len(running), 300, generator=generator) * 3
        host = HostChoices(logits)
        asks = [Ask(row, chosen, len(chosen.tokens)) for row, chosen in enumerate(running)]
        there = sampler.choose(logits.to(device), asks)
        for row, chosen in enumerate(running):
            token = host.token(row, chosen)
            assert there.token(row, chosen) == token, chosen.sampling
            assert there.finite(row)
            if (wanted := chosen.sampling.logprobs) is not None:
                ours, theirs = there.logprob(row, token, wanted), host.logprob(row, token, wanted)
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-6)
                assert [t for t, _ in ours.top] == [t for t, _ in theirs.top]
            chosen.tokens.append(token)
            if chosen.counts is not None:
                chosen.counts[token] += 1
