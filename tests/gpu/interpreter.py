"""Triton's interpreter made faster for tests: what it computes anew at every operation is kept.

A kernel that is interpreted spends nearly all of its time on Python objects that say what type a value has,
and very little in numpy. What is replaced here are internals of the Triton that constraints.txt pins; another
one runs as it is, only slower.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

TRITON = "3.7."  # whose internals these are


def hasten(changes: pytest.MonkeyPatch, *, overflows: bool) -> None:
    """Until ``changes`` are undone.

    ``overflows``: each sum and product of integers is computed once more, in 64 bits, to see whether it fits;
    and what the interpreter makes is checked.
    """
    import triton

    if not triton.__version__.startswith(TRITON):
        return
    from triton import language
    from triton.runtime import interpreter

    changes.setattr(interpreter, "_patch_lang", _patches_once(interpreter, language))
    changes.setattr(interpreter, "_get_np_dtype", _numpy_type_of(interpreter._get_np_dtype))
    changes.setattr(language.core, "_unwrap_if_constexpr", _unwrapped_by(language.core))
    changes.setattr(language.block_type, "__init__", _block_type_of(language.core))
    changes.setattr(language.tensor, "__init__", _tensor_of(language.core))
    semantic = language.semantic.TritonSemantic
    changes.setattr(semantic, "broadcast_impl_value", _broadcast_of(semantic.broadcast_impl_value))
    if not overflows:
        builder = interpreter.interpreter_builder
        changes.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        # Whether numpy's numbers are as wide as their types: of the interpreter's own making.
        changes.setattr(interpreter.TensorHandle, "__post_init__", lambda _: None)


def _patches_once(interpreter: Any, language: Any) -> Any:
    """The language is patched once a launch, as it needs to be.

    The interpreter does so again at every call of a ``triton.jit`` function inside a kernel, hundreds of
    attributes each time, and restores none of them before the launch ends. The first patch says it all.
    """
    patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    patched: set[int] = set()
    seen_by: dict[Any, set[int]] = {}  # function: the modules of the language that it names

    def patch_once(function: Any) -> Any:
        if function not in seen_by:
            named = function.__globals__.values()
            seen_by[function] = {id(value) for value in named if value in (language, language.core)}
        seen = seen_by[function]
        if seen and seen <= patched:
            return scope_type()
        new, scope = seen - patched, patch(function)
        restore = scope.restore
        patched.update(new)

        def restore_and_forget() -> None:
            restore()
            patched.difference_update(new)

        scope.restore = restore_and_forget
        return scope

    return patch_once


def _numpy_type_of(original: Any) -> Any:
    known: dict[str, Any] = {}

    def numpy_type(of: Any) -> Any:
        if of.name not in known:
            known[of.name] = original(of)
        return known[of.name]

    return numpy_type


def _unwrapped_by(core: Any) -> Any:
    original, constexpr = core._unwrap_if_constexpr, core.constexpr
    plain = {int, float, bool, str, type(None), core.dtype, core.block_type, core.pointer_type, core.tensor}

    def unwrapped(of: Any) -> Any:
        kind = type(of)
        return of if kind in plain else of.value if kind is constexpr else original(of)

    return unwrapped


def _block_type_of(core: Any) -> Any:
    """Block types of one shape share it."""
    original, constexpr = core.block_type.__init__, core.constexpr
    known: dict[tuple[int, ...], tuple[Any, str, int]] = {}  # shape: as Triton has it, as text, its product

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, constexpr) else size for size in shape])
        if sizes not in known:
            original(self, element_ty, shape)
            known[sizes] = self.shape, str(self.shape), self.numel
        self.element_ty = element_ty
        self.shape, text, self.numel = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    return init


def _tensor_of(core: Any) -> Any:
    """Tensors of one shape share it."""
    original = core.tensor.__init__
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}  # shape: as Triton has it, its product

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in known:
            original(self, handle, type)
            known[sizes] = self.shape, self.numel
        self.shape, self.numel = known[sizes]
        self.handle, self.type, self.dtype = handle, type, type.scalar

    return init


def _broadcast_of(original: Any) -> Any:
    """Tensors of one shape, which share it, stay as they are."""

    def broadcast(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        return (left, right) if left.shape is right.shape else original(self, left, right)

    return broadcast
