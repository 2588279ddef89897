"""Resolving ``--quantization auto`` before anything is loaded: afterwards it is a method like any other.

Sizes come from plans, made of headers alone, one for each rung of the ladder; what is chosen and why is
``quantize.auto``'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.kernels.device_memory import free_memory
from lowbit.loading.online import is_float
from lowbit.quantize.auto import KV_TOKENS, Budget, Sized, parse_budget, pick
from lowbit.quantize.recipe import Asked

if TYPE_CHECKING:
    from lowbit.loading import ModelPlan, ModulePlan

_log = logging.getLogger("lowbit")

Planner = Callable[[Asked], "ModelPlan"]


def resolved(header: CheckpointHeader, asked: Asked, plan: Planner) -> Asked:
    """``asked`` with a method in place of auto, and with the reason; anything else as it is.

    ``plan``: the model's plan with another quantization, errors not estimated.
    """
    budget_text = asked.auto_budget
    if budget_text is None:
        return asked
    plain = replace(asked, quantization=None, ignore="")
    if not is_float(header):
        described = plan(plain).described
        return replace(plain, chosen=f"auto: as stored: the model is quantized already ({described})")
    stored = plan(plain)
    if budget_text:
        budget = Budget(parse_budget(budget_text), f"budget={budget_text}")
    else:
        tokens = asked.tokens or min(stored.context_length, KV_TOKENS)
        free = free_memory(torch.device(stored.device))
        budget = Budget.of_free(free, stored.kv_bytes_per_token * tokens, tokens)

    def size_of(method: str | None) -> Sized | None:
        if method is None:
            return Sized(stored.weight_bytes)
        try:
            made = plan(replace(asked, quantization=method))
        except LowbitError as error:
            if error.code == "E0403":  # --strict, and a layer cannot have this group size
                return None
            raise
        quantized = [module for module in made.modules if not module.scheme.is_dense]
        nbytes = made.weight_bytes + sum(map(_wider_zeros, quantized))
        return Sized(nbytes, all(module.kernel != "reference" for module in quantized))

    choice = pick(stored.device, size_of, budget)
    if choice.method is None:
        return replace(plain, chosen=choice.reason)
    return replace(asked, quantization=choice.method, chosen=choice.reason)


def _wider_zeros(module: ModulePlan) -> int:
    """What a plan does not count: native kernels keep a zero point of any width in 16 bits."""
    scheme, (rows, columns) = module.scheme, module.shape[-2:]
    if scheme.zero != "integer" or module.kernel == "reference":
        return 0
    height, width = scheme.blocks[0]
    groups = -(-rows // (height or rows)) * -(-columns // (width or columns))
    return groups * (16 - int(scheme.weight.bits)) // 8


def say(asked: Asked) -> None:
    """What was chosen, in the log."""
    if asked.chosen:
        _log.info("lowbit: --quantization %s", asked.chosen)
