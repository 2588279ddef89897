"""The screen of an output head (``kernels.screened_head``): whether a model gets one, and what it costs.

It is read instead of the head in steps whose sequences are all greedy. It pays where a step waits for the
head's bytes: for heads of 16 or 32 bits a weight that are a good part of all that a step reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.errors import LowbitError, thousands
from lowbit.kernels import PackedWeight, screened_head
from lowbit.kernels.cpu_dense import CpuDense
from lowbit.kernels.screened_head import ScreenedHead
from lowbit.layers.linear import Linear
from lowbit.models.config import ModelConfig
from lowbit.numerics.scheme import Scheme

_log = logging.getLogger("lowbit")

NAME = "lm_head.screen"  # among packed modules
# Of a step's bytes: half of the head's are saved; less than a twentieth of a step is not worth the memory.
LEAST_SHARE = 0.1
LEAST_BYTES = 16 << 20  # of a head: a smaller one may stay in a processor's caches


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's packed matrices: of the head, of an embedding that is not the head, of routed
    experts, of all together."""

    head: int
    embedding: int
    experts: int
    all: int

    def step(self, config: ModelConfig) -> int:
        """What a step of one token reads of them."""
        idle = 0 if config.moe is None else self.experts * (1 - config.moe.per_token / config.moe.experts)
        return self.all - self.embedding - int(idle)


def refuses(
    wanted: str,
    config: ModelConfig,
    scheme: Scheme,
    kernel: str,
    weights: Weights,
    device: torch.device,
    ranks: int,
) -> str | None:
    """Why ``--lm-head-screen`` gives a head of such weights, on that kernel, none, or None. ``weights``:
    those of the model without it.

    E0415 where it is wanted and cannot be.
    """
    if wanted == "off":
        return "--lm-head-screen off"
    shape = (config.vocab_size, config.hidden_size)
    reason = screened_head.refuses(scheme, shape, device)
    if ranks > 1:
        reason = "ranks share the head"
    elif config.norm_head:
        reason = "each row's logit has a scale of its own"
    elif reason is None and kernel != CpuDense.name:
        reason = f"the head runs on {kernel}"
    if reason is not None:
        if wanted == "on":
            raise LowbitError("E0415", f"--lm-head-screen on: {reason}; use auto")
        return reason
    share = weights.head / max(weights.step(config), 1)
    if wanted == "auto" and share < LEAST_SHARE:
        return f"the head is {share:.1%} of what a step reads, {LEAST_SHARE:.0%} are needed"
    if wanted == "auto" and weights.head < LEAST_BYTES:
        return f"the head has {thousands(weights.head)} bytes, which caches may hold"
    return None


def screened(
    head: Linear,
    config: ModelConfig,
    keep: Callable[[str, Callable[[], PackedWeight | None]], PackedWeight | None],
    wanted: str,
) -> ScreenedHead | None:
    """The head with its screen, which ``keep`` takes from disk or has made; None where its weights, or what
    is done besides multiplying, allow none."""
    plain = len(head.weights) == 1 and not head.inputs and not head.outputs and head.order is None
    if plain and head.columns is None:
        [weight] = head.weights
        screen = keep(NAME, lambda: screened_head.make_screen(weight))
        options: dict[str, Any] = {"scale": config.logit_scale, "cap": config.logit_softcap}
        found = None if screen is None else ScreenedHead.of(weight, head.bias, screen, **options)
        if found is not None:
            _log.info(
                "lowbit: greedy tokens come from a screened output head (%s bytes)",
                thousands(found.screen.nbytes),
            )
            return found
    reason = "its weights are not all finite, or its inputs or outputs are changed"
    if wanted == "on":
        raise LowbitError("E0415", f"--lm-head-screen on: the output head can have none: {reason}; use auto")
    _log.info("lowbit: the output head is not screened: %s", reason)
    return None
