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
from lowbit.engine.runner import warm_sizes
from lowbit.engine.sequence import Sequence
from lowbit.kernels.gpu import runtime
from lowbit.kernels.recurrent import LayerState
from lowbit.loading import load_model
from lowbit.settings import Settings
from models.test_qwen_next import make_checkpoint, prompts


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


RECURRENT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "num_experts": 0,
    "mlp_only_layers": [],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def test_graphs_of_a_recurrent_model(device: torch.device, tmp_path: Path) -> None:
    """Tokens of eager steps, with padding rows and a prompt with a whole chunk. States that are nobody's hold
    NaN from the start and keep it: no capture moves them on, and padding neither reads nor writes one."""
    make_checkpoint(tmp_path, **RECURRENT)
    model = load_model(open_checkpoint(str(tmp_path)), device=device.type, dtype="bfloat16")
    asked = list(zip(prompts(65, 2, 1), (3, 6, 5), strict=True))
    found: list[dict[str, list[int]]] = []
    for graphs in ("none", "at start", "as steps occur"):
        settings = Settings(
            device=device.type,
            max_total_tokens=320,
            max_running_requests=5,
            disable_cuda_graph=True,
            disable_overlap_schedule=graphs == "none",
        )
        forced = ForcedModes(on_device=True, overlap=graphs != "none", check=True)
        engine = Engine(model, ByteTokenizer(), settings, forced=forced)
        runner = engine._runner
        [state] = [layer for layer in runner._caches if isinstance(layer, LayerState)]
        assert state.kernel.name == "gpu"
        state.inputs.fill_(torch.nan)
        state.matrices.fill_(torch.nan)
        if graphs != "none":
            runner._capture = runner.graphs(recorder_for(device), (4,), engine.context_length)
        if graphs == "at start":
            engine.prepare()
            assert [rows for rows, _ in runner._capture.sizes] == [4]
            assert state.matrices.isnan().all() and state.inputs.isnan().all()
        for index, (prompt, count) in enumerate(asked):
            sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            request = tuple(token % model.vocab_size for token in prompt)
            engine.submit(Request(id=str(index), prompt=request, sampling=sampling))
        tokens: dict[str, list[int]] = {}
        while engine.has_work():
            for event in engine.step():
                assert event.finish_reason != "error", event.error
                tokens.setdefault(event.id, []).extend(event.tokens)
        found.append(tokens)
        unused = state.matrices.isnan().flatten(1).all(1)
        assert state.matrices[~unused].isfinite().all() and int((~unused).sum()) == len(asked)
        assert unused[-1] and state.inputs[unused].isnan().all()
        replayed = engine.status().captured_steps
        assert replayed == 0 if graphs == "none" else replayed >= 3
    assert found[1] == found[0] and found[2] == found[0]
    assert [len(set(found[0][str(index)])) > 1 for index in range(3)] == [True] * 3


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
            if chosen.said is not None:
                chosen.said.add(token)


DELAYED = "fp8:activation=delayed,history=4"


@pytest.mark.parametrize(
    ("quantization", "largest", "asked"),
    [
        pytest.param(None, 64, [(1,), (16,), (20,), (29, 4), (40, 1, 7)], id="stored"),
        pytest.param(DELAYED, 9, [(1,), (6,)], marks=pytest.mark.slow, id="delayed scales"),
    ],
)
def test_no_request_waits_for_a_kernel_to_be_compiled(
    quantization: str | None,
    largest: int,
    asked: list[tuple[int, ...]],
    device: torch.device,
    tmp_path: Path,
) -> None:
    """What a warm-up launched is all that prompts of other lengths, alone and beside others, and every kind
    of sampling ask for; and it leaves nothing behind."""
    tiny.write_folder(tmp_path)
    options = {"device": device.type, "dtype": "bfloat16", "quantization": quantization}
    model = load_model(open_checkpoint(str(tmp_path)), **options)
    assert (len(model.states) > 0) == (quantization is not None)
    for _, state in model.states:  # as of a server that goes on from a file
        state.scale.fill_(3.0)
        state.amax_history[2] = 7.0
    states = model.states.state_dict()
    settings = Settings(
        device=device.type, max_total_tokens=320, max_running_requests=3, disable_cuda_graph=True
    )
    engine = Engine(model, ByteTokenizer(), settings, forced=ForcedModes(on_device=True, check=True))
    runner, sampler = engine._runner, engine._sampler
    assert sampler is not None
    caches = [buffer for cache in runner._paged for buffer in cache.buffers.values()]
    with runtime.recording() as warm:
        sampler.warm_up()
        runner.warm_up(warm_sizes(largest, max(map(len, asked))))
    assert warm and all(not buffer.any() for buffer in caches)
    for name, buffer in model.states.state_dict().items():
        assert torch.equal(buffer, states[name])
    draw = random.Random(3)
    with runtime.recording() as served:
        for number, lengths in enumerate(asked):
            for index, length in enumerate(lengths):
                prompt = tuple(draw.randrange(model.vocab_size) for _ in range(length))
                sampling = SamplingParams(
                    temperature=index * 0.5,
                    top_p=0.9,
                    frequency_penalty=number % 2 * 0.3,
                    logprobs=number or None,
                    max_tokens=2,
                    ignore_eos=True,
                )
                engine.submit(Request(id=f"{number} {index}", prompt=prompt, sampling=sampling))
            while engine.has_work():
                assert all(event.finish_reason != "error" for event in engine.step())
    late = [f"{one.function} {dict(one.types)} {dict(one.constants)}" for one in set(served) - set(warm)]
    assert not late, "\n".join(late)
