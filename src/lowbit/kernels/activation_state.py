"""Delayed scaling: an input's scale comes from the largest |x| of earlier steps, so it is known beforehand.

A state belongs to a layer's input and has two buffers at fixed addresses, so that a captured step can replay
what changes them: ``scale``, which multiplies x (1 at first), and ``amax_history``, whose slot 0 collects the
largest |x| of the step in progress while the others hold those of the last steps, oldest first:

    history  [ this step | oldest … newest ]    end of a step: shift left, this step becomes the newest

A step is one forward pass of the model over one batch. At its end the scale becomes (the format's largest
value / 2^margin) / amax, with amax the maximum of the history before the shift, or this step's alone. A layer
that saw nothing (amax 0) keeps everything; an amax of infinity or NaN keeps the scale; a scale that would be
infinite is the largest float. Because of it a request's numbers depend on what was served before.

Of an input whose columns lie on several ranks each notes what it sees; at the end of a step they tell each
other, once for all layers, and all states become what they would be in one process.

Source: "FP8 Formats for Deep Learning" (Micikevicius et al., 2022), as in TransformerEngine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import activation_native
from lowbit.kernels.gpu import runtime
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.numerics.scheme import ActivationScheme, Delay

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class ActivationState:
    """See the module docstring. ``limit``: the value of the format that an amax becomes (e4m3: 448)."""

    delay: Delay
    limit: float
    scale: Tensor  # float32 (1,)
    amax_history: Tensor = field(repr=False)  # float32 (length,)

    @staticmethod
    def fresh(delay: Delay, limit: float, device: torch.device | str = "cpu") -> ActivationState:
        """Scale 1, nothing seen."""
        scale = torch.ones(1, dtype=torch.float32, device=device)
        return ActivationState(delay, limit, scale, torch.zeros(delay.length, device=device))

    @property
    def largest(self) -> float:
        """What amax times the scale is to be: the limit over 2^margin."""
        return self.limit * 2.0**-self.delay.margin

    def note(self, amax: Tensor) -> None:
        """Take the largest |x| of one call into the step in progress."""
        self.amax_history[:1] = torch.maximum(self.amax_history[:1], amax)

    def update(self) -> None:
        """The end of a step, in torch; nothing asks the device for a value."""
        history = self.amax_history
        newest = history[:1].clone()
        amax = newest if self.delay.algorithm == "most_recent" else history.amax(0, keepdim=True)
        rolled = history.roll(-1)
        rolled[0] = 0
        used = newest != 0
        history.copy_(torch.where(used, rolled, history))
        scale = (torch.full_like(amax, self.largest) / amax).clamp(max=_LARGEST)
        valid = used & (amax > 0) & torch.isfinite(amax)
        self.scale.copy_(torch.where(valid, scale, self.scale))


class ActivationStates:
    """The states of a model by layer name, and what happens to all of them at the end of a step."""

    def __init__(self) -> None:
        self.file: Path | None = None  # where they are kept between runs
        self._states: dict[str, ActivationState] = {}
        self._across = ALONE
        self._shared: list[Tensor] = []  # slot 0 of those whose inputs lie on several ranks
        self._update: Callable[[], None] | None = None

    def add(
        self, name: str, scheme: ActivationScheme, device: torch.device, across: Parallel = ALONE
    ) -> ActivationState:
        """A fresh state for the layer ``name``; further ones of the same layer are numbered. ``across``: the
        ranks that its input's columns lie on."""
        assert scheme.delay is not None and scheme.limit > 0, "a delayed scheme says how, and its limit"
        unique, number = name, 1
        while unique in self._states:
            unique, number = f"{name}.{number}", number + 1
        self._states[unique] = state = ActivationState.fresh(scheme.delay, scheme.limit, device)
        if across.size > 1:
            self._across = across
            self._shared.append(state.amax_history[:1])
        self._update = None
        return state

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[tuple[str, ActivationState]]:
        return iter(self._states.items())

    def update(self) -> None:
        """The end of a step: one call of native code, or one launch where the states are on a GPU."""
        if not self._states:
            return
        if self._shared:
            seen = self._across.largest(torch.cat(self._shared))
            torch._foreach_copy_(self._shared, list(seen.split(1)))
        if self._update is None:
            self._update = self._updater()
        self._update()

    def _updater(self) -> Callable[[], None]:
        states = list(self._states.values())
        if runtime.runs_on(states[0].scale.device):
            from lowbit.kernels.gpu.activation_quant import DelayedUpdate

            return DelayedUpdate.of(states)
        described = [
            (state.scale, state.amax_history, state.largest, state.delay.algorithm == "most_recent")
            for state in states
        ]
        return activation_native.DelayedUpdate.of(described) or self._update_in_torch

    def _update_in_torch(self) -> None:
        for state in self._states.values():
            state.update()

    @contextmanager
    def kept_as_they_are(self) -> Iterator[None]:
        """What steps inside this block make of the states is undone behind it, in place."""
        buffers = [each for state in self._states.values() for each in (state.scale, state.amax_history)]
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all buffers: ``<layer>.scale`` and ``<layer>.amax_history``."""
        return {
            f"{name}.{kind}": buffer.cpu().clone()
            for name, state in self._states.items()
            for kind, buffer in (("scale", state.scale), ("amax_history", state.amax_history))
        }

    def load_state_dict(self, stored: Mapping[str, Tensor], where: str = "saved states") -> None:
        """Restore what ``state_dict`` gave, in place; all of it must fit before anything changes."""
        expected = self.state_dict()
        if differing := sorted(expected.keys() ^ stored.keys()):
            how = "missing" if differing[0] in expected else "of no layer of this model"
            raise LowbitError(
                "E0706",
                f"{where}: tensor {differing[0]!r} is {how}; the states must be those of the same model with "
                "the same --quantization",
            )
        for name, tensor in expected.items():
            found = stored[name]
            if found.shape != tensor.shape or found.dtype is not torch.float32:
                raise LowbitError(
                    "E0706",
                    f"{where}: tensor {name!r} is {found.dtype} {list(found.shape)}, expected float32 "
                    f"{list(tensor.shape)}; the history must be as long as the one that was saved",
                )
        for name, state in self._states.items():
            state.scale.copy_(stored[f"{name}.scale"])
            state.amax_history.copy_(stored[f"{name}.amax_history"])

    def save(self, file: Path) -> None:
        """Write ``state_dict`` as safetensors; a file that is there is replaced whole."""
        partial = file.with_name(f"{file.name}.partial")
        try:
            save_file(self.state_dict(), partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            raise LowbitError("E0300", f"{file}: states of delayed scales cannot be saved: {error}") from None

    def resume(self, file: Path) -> None:
        """Go on from what ``file`` holds, if it is there, and ``keep`` it there."""
        self.file = file
        if file.exists():
            self.load(file)

    def keep(self) -> None:
        """Save for the next run, where a file was named."""
        if self.file is not None and self._states:
            self.save(self.file)

    def load(self, file: Path) -> None:
        """Restore from a file that ``save`` wrote."""
        try:
            stored = load_file(file)
        except (OSError, SafetensorError) as error:
            raise LowbitError(
                "E0706", f"{file}: no safetensors file of saved states ({error}); save them again"
            ) from None
        self.load_state_dict(stored, str(file))
