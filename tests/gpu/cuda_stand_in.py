"""What ``CudaRecorder`` asks of CUDA, on CPU tensors: graphs that do again exactly what was recorded.

A capture writes down every operation of torch and every launch of a Triton kernel with its arguments, and a
replay does these and nothing of Python's: numbers that change from step to step stay what they were, and
memory that the capture allocated holds NaN before each replay, as other graphs share it. What CUDA forbids is
an error with the words that torch has for it: waiting for the device, uploading numbers of the host, tensors
that do not say on which device they lie; and launches whose kernels would be compiled while the stream is
captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lowbit.kernels import head_products
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.runtime import Launch
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.step_plan import Operation

_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.is_pinned.default,
    _aten._pin_memory.default,
}
_UPLOADS = {_aten.lift_fresh.default}
_READ = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__}
_MADE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.eye, torch.tensor}


class _NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in _WAITING:
            raise RuntimeError(f"called a synchronizing operation: {function}")
        if function in _UPLOADS:
            raise RuntimeError(f"uploads numbers of the host: {function}")
        return self.run(function, args, kwargs or {})

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)


class _OnADevice(TorchFunctionMode):
    """What is made says where, and nothing is read back."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function in _READ:
            raise RuntimeError(f"called a synchronizing operation: {function.__name__}")
        if function in _MADE and kwargs.get("device") is None:
            raise RuntimeError(f"torch.{function.__name__} does not say on which device")
        return function(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graph(_NoWaiting):
    """Stands for torch.cuda.CUDAGraph. ``works``: what is done again, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Callable[[], object]] = []
        self._own: dict[int, Tensor] = {}  # a tensor of each storage that the capture allocated

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do it, and write down what does it again into the same memory."""
        found = function(*args, **kwargs)
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in made if tensor.numel() and _storage(tensor) not in given]
        self._own |= {_storage(tensor): tensor for tensor in fresh}
        if fresh:

            def again() -> None:
                for old, new in zip(made, tree_leaves(function(*args, **kwargs)), strict=True):
                    old.copy_(new)

            if not function.__name__.startswith(("empty", "new_empty")):
                self.works.append(again)
        elif function._schema.is_mutable:
            self.works.append(lambda: function(*args, **kwargs))
        return found

    def forget_numbers(self) -> None:
        """NaN, or -1, in all that the capture allocated."""
        for tensor in self._own.values():
            storage = tensor.untyped_storage()
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)  # type: ignore[call-overload]

    def replay(self) -> None:
        """Do it all again."""
        self.forget_numbers()
        for work in self.works:
            work()


class _Stream:
    """Stands for torch.cuda.Stream: work is done when it is queued."""

    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        """Nothing is under way."""


class StandIn:
    """Stands for torch.cuda while it is entered. ``graphs``: those that were captured."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self._current: list[_NoWaiting] = []
        self._compiled: set[Launch] = set()
        self._mode = 0

    @contextmanager
    def entered(self) -> Iterator[StandIn]:
        """``CudaRecorder`` records here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "launch", self._launching(runtime.launch))
            patch.setattr(torch.cuda, "Stream", _Stream)
            patch.setattr(torch.cuda, "current_stream", _Stream)
            patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
            patch.setattr(torch.cuda, "CUDAGraph", Graph)
            patch.setattr(torch.cuda, "graph", self._capturing)
            patch.setattr(torch.cuda, "stream", self._on_a_stream)
            patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self._mode)
            patch.setattr(torch.cuda, "set_sync_debug_mode", self._set_mode)
            host = self._not_in_captures("numbers of the host", torch.from_numpy)
            patch.setattr(torch, "from_numpy", host)
            patch.setattr(Operation, "__call__", self._not_in_captures("native code", Operation.__call__))
            patch.setattr(head_products, "_native", lambda: None)
            patch.setattr(Rotator, "_native", lambda *_: False)
            yield self

    def _set_mode(self, mode: int | str) -> None:
        self._mode = 2 if mode == "error" else int(mode)

    @contextmanager
    def _on_a_stream(self, stream: object) -> Iterator[None]:
        with self._watching(_NoWaiting()) if self._mode == 2 else nullcontext():
            yield

    @contextmanager
    def _capturing(self, graph: Graph, **_: object) -> Iterator[None]:
        with self._watching(graph):
            yield
        graph.forget_numbers()  # a capture computes nothing
        self.graphs.append(graph)

    @contextmanager
    def _watching(self, mode: _NoWaiting) -> Iterator[None]:
        self._current.append(mode)
        try:
            with mode, _OnADevice():
                yield
        finally:
            self._current.pop()

    def _launching(self, launch: Callable[..., None]) -> Callable[..., None]:
        """``runtime.launch``, outside of all modes, and written down."""

        def launched(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
            def run() -> None:
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    launch(kernel, grid, *arguments, **constants)

            with _disable_current_modes(), torch._C.DisableTorchFunction(), runtime.recording() as seen:
                launch(kernel, grid, *arguments, **constants)
            if runtime._recorded is not None:
                runtime._recorded.extend(seen)
            graph = self._current[-1] if self._current else None
            if isinstance(graph, Graph):
                if not self._compiled.issuperset(seen):
                    raise RuntimeError(f"compiles while the stream is captured: {seen}")
                graph.works.append(run)
            self._compiled.update(seen)

        return launched

    def _not_in_captures(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if self._current:
                raise RuntimeError(f"{what} inside a capture")
            return function(*arguments)

        return called
