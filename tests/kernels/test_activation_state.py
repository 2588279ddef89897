"""Delayed scaling against a numpy oracle written from the recipe's text, over long runs with spikes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationState, ActivationStates
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay

CPU = torch.device("cpu")


@dataclass
class Oracle:
    """The definition (``kernels.activation_state``), number by number."""

    length: int
    margin: int
    algorithm: str
    scale: np.float32 = np.float32(1.0)  # noqa: RUF009
    history: list[np.float32] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = [np.float32(0)] * self.length

    @np.errstate(over="ignore")
    def call(self, x: np.ndarray) -> np.ndarray:
        """Dequantized x: codes by searching all e4m3 values, ties to the even one."""
        amax = np.float32(np.abs(x).max())
        if np.isnan(amax) or amax > self.history[0]:
            self.history[0] = amax
        steps = np.clip(x * self.scale, -448, 448)
        table = np.unique([(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)][:-1])
        table = np.concatenate(([m * 2.0**-9 for m in range(8)], table))
        distance = np.abs(np.abs(steps)[..., None].astype(np.float64) - table)
        nearest = distance.argmin(-1)
        above = np.minimum(nearest + 1, len(table) - 1)
        tie = np.take_along_axis(distance, above[..., None], -1)[..., 0] == distance.min(-1)
        nearest = np.where(tie & (nearest % 2 == 1), above, nearest)
        codes = np.sign(steps) * table[nearest]
        return codes.astype(np.float32) * (np.float32(1) / self.scale)

    def end_of_step(self) -> None:
        newest = self.history[0]
        if newest == 0:
            return
        amax = newest if self.algorithm == "most_recent" else np.max(self.history)
        old = list(self.history)
        for i in range(1, self.length - 1):
            self.history[i] = old[i + 1]
        self.history[self.length - 1] = newest
        self.history[0] = np.float32(0)
        if amax == 0 or not np.isfinite(amax):
            return
        with np.errstate(over="ignore"):
            scale = np.float32(448.0 * 2.0**-self.margin) / amax
        self.scale = np.finfo(np.float32).max if np.isinf(scale) else scale


def steps(count: int, seed: int) -> list[list[np.ndarray]]:
    """Of every step the inputs of 0 to 3 calls; with spikes, silence, tiny numbers, infinity and NaN."""
    generator = np.random.default_rng(seed)
    found = []
    for step in range(count):
        calls = []
        for _ in range(generator.integers(0, 4)):
            x = generator.standard_normal((generator.integers(1, 4), 24)).astype(np.float32)
            x *= np.float32(2.0 ** generator.integers(-3, 4))
            x *= np.float32({10: 3000.0, 30: 0.0, 50: 1e-41, 51: 1e-41}.get(step % 60, 1.0))
            calls.append(x)
        found.append(calls)
    return found


@pytest.mark.parametrize("margin", [0, 2, -1])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_a_long_run_follows_the_text(native: bool, length: int, algorithm: str, margin: int) -> None:
    delay = Delay(length, margin, algorithm)  # type: ignore[arg-type]
    scheme = ActivationScheme(number_format("e4m3"), (0, 0), "delayed", limit=448.0, delay=delay)
    states = ActivationStates()
    state = states.add("layer", scheme, CPU)
    states.add("another layer, which is never used", scheme, CPU)
    transform, oracle = InputTransform(scheme, state=state), Oracle(length, margin, algorithm)
    seen = set()
    for calls in steps(150, length):
        for x in calls:
            tensor = torch.from_numpy(x)
            codes, factor = transform(tensor) if native else transform.in_torch(tensor)
            assert factor is not None
            np.testing.assert_array_equal((codes * factor).numpy(), oracle.call(x))
        if native:
            states.update()
        else:
            state.update()
        oracle.end_of_step()
        assert state.scale.item() == oracle.scale
        np.testing.assert_array_equal(state.amax_history.numpy(), np.array(oracle.history))
        seen.add(state.scale.item())
    assert len(seen) > 10, "the scale moved"
    (_, used), (_, unused) = states
    assert used is state and unused.scale.item() == 1 and not unused.amax_history.any()


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_infinity_and_nan_keep_the_scale(algorithm: str, native: bool) -> None:
    delay = Delay(3, 0, algorithm)  # type: ignore[arg-type]
    states = ActivationStates()
    scheme = ActivationScheme(number_format("e4m3"), (0, 0), "delayed", limit=448.0, delay=delay)
    state, oracle = states.add("layer", scheme, CPU), Oracle(3, 0, algorithm)
    for amax in (2.0, float("inf"), 4.0, 8.0, float("nan"), 1.0, 16.0, 3.0, 1e-45, 1e-45, 1e-45, 5.0):
        state.amax_history[0] = amax
        oracle.history[0] = np.float32(amax)
        if native:
            states.update()
        else:
            state.update()
        oracle.end_of_step()
        assert state.scale.item() == oracle.scale
        np.testing.assert_array_equal(state.amax_history.numpy(), np.array(oracle.history))
    assert torch.isfinite(state.scale).all()


def test_the_first_step_saturates() -> None:
    delay = Delay()
    scheme = ActivationScheme(number_format("e4m3"), (0, 0), "delayed", limit=448.0, delay=delay)
    state = ActivationState.fresh(delay, 448.0)
    codes, factor = InputTransform(scheme, state=state)(torch.tensor([[1000.0, -3.0]]))
    assert codes.tolist() == [[448.0, -3.0]] and factor is not None and factor.item() == 1
    assert len(state.amax_history) == 1024 and state.amax_history[0] == 1000


def made(length: int = 4) -> ActivationStates:
    states = ActivationStates()
    scheme = ActivationScheme(number_format("e4m3"), (0, 0), "delayed", limit=448.0, delay=Delay(length))
    for number, name in enumerate(("a", "b", "b")):
        state = states.add(name, scheme, CPU)
        state.amax_history.copy_(torch.arange(length) + 10.0 * number)
        state.scale.fill_(number + 0.5)
    return states


def test_saved_states_come_back_in_place(tmp_path: Path) -> None:
    saved, loaded = made(), made()
    assert [name for name, _ in saved] == ["a", "b", "b.1"]
    saved.save(tmp_path / "states.safetensors")
    addresses = [state.scale.data_ptr() for _, state in loaded]
    for _, state in loaded:
        state.scale.zero_()
        state.amax_history.zero_()
    loaded.load(tmp_path / "states.safetensors")
    assert [state.scale.data_ptr() for _, state in loaded] == addresses
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_states_that_do_not_fit_are_refused_whole(tmp_path: Path) -> None:
    states, file = made(), tmp_path / "states.safetensors"
    before = states.state_dict()
    made(5).save(file)
    with pytest.raises(LowbitError, match=r"'a.amax_history' is torch.float32 \[5\], expected float32 \[4\]"):
        states.load(file)
    missing = made().state_dict()
    del missing["b.1.scale"]
    with pytest.raises(LowbitError, match=r"'b.1.scale' is missing"):
        states.load_state_dict(missing)
    with pytest.raises(LowbitError, match=r"'c.scale' is of no layer"):
        states.load_state_dict({**before, "c.scale": torch.ones(1)})
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(LowbitError, match="E0706"):
        states.load(file)
    with pytest.raises(LowbitError, match="E0706"):
        states.load(tmp_path / "nowhere")
    for name, tensor in before.items():
        assert torch.equal(states.state_dict()[name], tensor)


def test_steps_that_are_nobodys_leave_states_as_they_were() -> None:
    scheme = ActivationScheme(number_format("e4m3"), (0, 0), "delayed", limit=448.0, delay=Delay(4))
    states = ActivationStates()
    state = states.add("layer", scheme, CPU)
    state.note(torch.tensor([3.0]))
    states.update()
    state.note(torch.tensor([2.0]))  # of the step in progress
    before = states.state_dict()
    with pytest.raises(MemoryError), states.kept_as_they_are():
        state.note(torch.tensor([1e6]))
        states.update()
        assert not torch.equal(state.scale, before["layer.scale"])
        raise MemoryError
    assert all(torch.equal(buffer, before[name]) for name, buffer in states.state_dict().items())
    assert next(iter(states))[1] is state
