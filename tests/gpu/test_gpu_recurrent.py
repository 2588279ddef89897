"""Triton's gated delta rule beside its definition in torch: parts of any length, states, padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels.gpu import recurrent as gpu
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.recurrent import CHUNK, CHUNK_KEYS, TOKENS, GpuDelta
from lowbit.kernels.recurrent import StateSpec
from lowbit.kernels.recurrent_cpu import sigmoid_gate
from lowbit.kernels.recurrent_reference import ReferenceDelta
from lowbit.loading import load_model
from models.test_qwen_next import make_checkpoint, prompts, worst
from recurrent_layers import SLOTS, Layer, batch_of, poisoned

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SPECS = {
    "odd heads": StateSpec(k_heads=2, heads=4, k_dim=20, v_dim=24, taps=4),
    "wide keys, two taps": StateSpec(k_heads=1, heads=2, k_dim=80, v_dim=16, taps=2),
    "a head, no past": StateSpec(k_heads=1, heads=1, k_dim=16, v_dim=20, taps=1),
}


def mixed_rows(layer: Layer, count: int, dtype: torch.dtype) -> Tensor:
    """Of a layer's input, in rows that end with NaN."""
    width = layer.spec.width
    wide = torch.full((count, width + 5), torch.nan, dtype=dtype, device=layer.device)
    return wide[:, :width].copy_(layer.normal(count, width))


STEPS = {
    "a prompt among others": [(11, 0, 2), (1, 17, 0), (3, 1, 1), (9, 3, 4)],
    "short parts": [(2, 5, 3), (TOKENS, 0, 0), (1, 0, 1)],
    "one token each": [(1, 7, 4), (1, 0, 0), (1, 1, 2)],
}


@pytest.mark.parametrize(
    ("case", "name", "dtype"),
    [
        *((case, name, BF16) for case in STEPS for name in SPECS),
        *(("short parts", name, F32) for name in SPECS),
    ],
)
def test_outputs_and_states(case: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    layer, parts = Layer(SPECS[name], device), STEPS[case]
    batch = batch_of(parts, device)
    mixed = mixed_rows(layer, len(batch.tokens), dtype)
    ours, theirs = layer.state(GpuDelta()), layer.state(ReferenceDelta())
    poisoned(ours, parts)
    poisoned(theirs, parts)
    out = GpuDelta().run(mixed, ours, batch, layer.weights)
    wanted = ReferenceDelta().by_rule(mixed, theirs, batch, layer.weights, False)
    rounding = {"rtol": 2**-7, "atol": 2e-3} if dtype is BF16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out, wanted, **rounding)
    torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=0, atol=0)
    torch.testing.assert_close(ours.matrices, theirs.matrices, rtol=1e-4, atol=1e-5)


WHOLE = {
    "odd heads": [(CHUNK + 1, 0, 2), (1, 17, 0), (CHUNK, 5, 1)],
    "wide keys, two taps": [(2, 0, 0), (CHUNK, 7, 3)],
    "a head, no past": [(CHUNK, 0, 1), (2 * CHUNK, 1, 0)],
    "two strips": [(CHUNK + 1, 2, 0)],
}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in all memory that a layer works in."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        plain = getattr(owner, name)

        def filled(*args: object, plain: Callable[..., Tensor] = plain, **options: object) -> Tensor:
            made = plain(*args, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, filled)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, BF16) for name in WHOLE), ("a head, no past", F32)], ids=str
)
def test_whole_chunks(name: str, dtype: torch.dtype, poison: None, device: torch.device) -> None:
    """Products of numbers in two halves: states within 3e-5 of the largest number there is."""
    spec = SPECS.get(name, StateSpec(k_heads=1, heads=2, k_dim=12, v_dim=36, taps=3))
    layer, parts = Layer(spec, device), WHOLE[name]
    batch = batch_of(parts, device)
    mixed = mixed_rows(layer, len(batch.tokens), dtype)
    ours, theirs = layer.state(GpuDelta()), layer.state(ReferenceDelta())
    poisoned(ours, parts)
    poisoned(theirs, parts)
    out = GpuDelta().run(mixed, ours, batch, layer.weights)
    wanted = ReferenceDelta().by_rule(mixed, theirs, batch, layer.weights, False)
    rounding = {"rtol": 2**-7, "atol": 4e-3} if dtype is BF16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, wanted, **rounding)
    assert torch.equal(ours.inputs, theirs.inputs)
    assert torch.isfinite(ours.matrices).all()
    largest = theirs.matrices.abs().max()
    assert (ours.matrices - theirs.matrices).abs().max() <= 3e-5 * largest


@pytest.mark.parametrize("decays", ["none", "sudden"])
def test_chunks_whose_tokens_depend_on_each_other(decays: str, device: torch.device) -> None:
    """All keys are nearly the same and are told all of it: the inverse is far from the unit matrix. What is
    forgotten at once, e^-30000 of it left, takes no digit from the decays of the tokens behind."""
    layer = Layer(StateSpec(k_heads=1, heads=2, k_dim=16, v_dim=16, taps=1), device)
    spec = layer.spec
    mixed = mixed_rows(layer, 2 * CHUNK, F32)
    mixed[:, : 2 * spec.k_dim] = mixed[0, : 2 * spec.k_dim] + mixed[:, : 2 * spec.k_dim] / 100
    mixed[:, -2 * spec.heads : -spec.heads] = 9.0  # beta: nearly 1
    mixed[:, -spec.heads :] = -7.0
    if decays == "sudden":
        mixed[5::20, -spec.heads :] = 3e4
    weights = replace(layer.weights, decay=-torch.ones_like(layer.weights.decay))
    weights.bias.zero_()
    batch = batch_of([(len(mixed), 3, 1)], device)
    ours, theirs = layer.state(GpuDelta()), layer.state(ReferenceDelta())
    out = GpuDelta().run(mixed, ours, batch, weights)
    wanted = ReferenceDelta().by_rule(mixed, theirs, batch, weights, False)
    assert (out - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (ours.matrices - theirs.matrices).abs().max() <= 1e-4 * theirs.matrices[1].abs().max()


def test_cuts_between_chunks_and_company_change_no_bit(device: torch.device) -> None:
    layer = Layer(SPECS["a head, no past"], device)
    mixed, other = mixed_rows(layer, 2 * CHUNK + 3, F32), mixed_rows(layer, CHUNK + 2, F32)
    whole = layer.state(GpuDelta())
    wanted = GpuDelta().run(mixed, whole, batch_of([(len(mixed), 0, 1)], device), layer.weights)
    state, found, at = layer.state(GpuDelta()), [], 0
    for before, count in ((CHUNK + 2, CHUNK), (1, CHUNK + 2), (0, 1)):
        parts = [*([(before, 5, 3)] if before else []), (count, at, 1), (2, 9, 0)]
        rows = torch.cat((other[:before], mixed[at : at + count], other[:2]))
        made = GpuDelta().run(rows, state, batch_of(parts, device), layer.weights)
        found.append(made[before : before + count])
        at += count
    assert torch.equal(torch.cat(found), wanted)
    assert torch.equal(state.matrices[1], whole.matrices[1])


def test_padding_moves_nothing(device: torch.device) -> None:
    """Rows of slot -1 and context 0 behind a graph's real ones, which keep their bits, touch no state."""
    layer, parts = Layer(SPECS["odd heads"], device), STEPS["one token each"]
    padded = [*parts, (1, 0, -1), (1, 0, -1)]
    alone, batch = batch_of(parts, device), batch_of(padded, device)
    batch.context_lengths[3:] = 0
    mixed = mixed_rows(layer, len(padded), BF16)
    plain, filled = layer.state(GpuDelta()), layer.state(GpuDelta())
    wanted = GpuDelta().run(mixed[:3], plain, alone, layer.weights)
    out = GpuDelta().run(mixed, filled, batch, layer.weights)
    assert torch.equal(out[:3], wanted) and torch.isfinite(out).all()
    assert torch.equal(filled.inputs, plain.inputs) and torch.equal(filled.matrices, plain.matrices)
    untouched = [1, 3, SLOTS]
    assert torch.equal(filled.matrices[untouched], layer.matrices[untouched])
    assert torch.equal(filled.inputs[untouched], layer.inputs[untouched])


@pytest.mark.parametrize("cuts", [[1, 1, 1, 10], [TOKENS, 5], [12, 1], [9, 4]])
def test_chunks_and_company_change_no_bit(cuts: list[int], device: torch.device) -> None:
    layer = Layer(SPECS["odd heads"], device)
    mixed, other = mixed_rows(layer, sum(cuts), F32), mixed_rows(layer, 3 * len(cuts), F32)
    whole = layer.state(GpuDelta())
    wanted = GpuDelta().run(mixed, whole, batch_of([(len(mixed), 0, 1)], device), layer.weights)
    state, found, at = layer.state(GpuDelta()), [], 0
    for step, count in enumerate(cuts):
        parts = [(3, 3 * step, 3), (count, at, 1)]
        rows = torch.cat((other[3 * step : 3 * step + 3], mixed[at : at + count]))
        found.append(GpuDelta().run(rows, state, batch_of(parts, device), layer.weights)[3:])
        at += count
    assert torch.equal(torch.cat(found), wanted)
    assert torch.equal(state.matrices[1], whole.matrices[1])
    assert torch.equal(state.inputs[1], whole.inputs[1])


def test_many_sequences(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are looked at together; parts that fill tiles of tokens and that do not."""
    monkeypatch.setattr(gpu, "SEQUENCES", 4)
    spec = StateSpec(k_heads=1, heads=1, k_dim=4, v_dim=4, taps=3)
    layer, lengths = Layer(spec, device), [1] * 4 + [TOKENS, 1, TOKENS + 1, 2, 1]
    layer.inputs, layer.matrices = layer.normal(10, 2, spec.channels), layer.normal(10, 1, 4, 4)
    parts = [(count, 2 * (slot % 3), slot) for slot, count in enumerate(lengths)]
    batch = batch_of(parts, device)
    mixed = mixed_rows(layer, sum(lengths), F32)
    ours, theirs = layer.state(GpuDelta()), layer.state(ReferenceDelta())
    out = GpuDelta().run(mixed, ours, batch, layer.weights)
    wanted = ReferenceDelta().by_rule(mixed, theirs, batch, layer.weights, False)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.matrices, theirs.matrices, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.inputs, theirs.inputs)


LAUNCHES = [
    (16, TOKENS, ["convolve", "rule", "finish"]),
    (16, TOKENS + 1, ["convolve", "keep", "rule", "finish"]),
    (16, CHUNK, ["convolve", "keep", "chunk_systems", "chunk_states", "rule", "finish"]),
    (CHUNK_KEYS + 1, CHUNK, ["convolve", "keep", "rule", "finish"]),
]


@pytest.mark.parametrize(("k_dim", "longest", "wanted"), LAUNCHES)
def test_launches_of_a_step(k_dim: int, longest: int, wanted: list[str], device: torch.device) -> None:
    """By host numbers alone, whatever the lengths on the device say."""
    layer = Layer(StateSpec(k_heads=1, heads=1, k_dim=k_dim, v_dim=16, taps=3), device)
    counts = [CHUNK // 8 - 1] * 8 + [8] if "chunk_states" in wanted else [2, 1]
    layer.inputs, layer.matrices = (x.repeat(2, *[1] * (x.dim() - 1)) for x in (layer.inputs, layer.matrices))
    parts = [(count, 2 * slot, slot) for slot, count in enumerate(counts)]
    batch = replace(batch_of(parts, device), max_query=longest)
    mixed = mixed_rows(layer, len(batch.tokens), BF16)
    ours, theirs = layer.state(GpuDelta()), layer.state(ReferenceDelta())
    with runtime.recording() as launches:
        out = GpuDelta().run(mixed, ours, batch, layer.weights)
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)
    assert [launch.function for launch in launches] == wanted
    expected = ReferenceDelta().by_rule(mixed, theirs, batch, layer.weights, False)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_the_sigmoid_gate(dtype: torch.dtype, device: torch.device) -> None:
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 2 * 75, generator=random).to(device, dtype)
    x, gate = torch.randn(5, 75, generator=random).to(device, dtype), rows[:, 75:]
    wanted = (x.float() * torch.sigmoid(gate.float())).to(dtype)
    assert sigmoid_gate(x, gate) is x
    torch.testing.assert_close(x, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cache of the test helpers is on a CPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_whole_model(tmp_path: Path) -> None:
    """Qwen3-Next beside transformers in float32, on the GPU's kernels alone."""
    changes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    oracle = make_checkpoint(tmp_path, num_experts=0, mlp_only_layers=[], **changes)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    given = prompts(1, 3, 21)
    with runtime.recording() as launches:
        made = prompt_logits(model, given)
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)
    assert {"convolve", "keep", "rule", "finish", "_sigmoid_gate"} <= {one.function for one in launches}
    for prompt, logits in zip(given, made, strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([prompt])).logits[0]
        assert worst(logits, expected) <= 1e-3
