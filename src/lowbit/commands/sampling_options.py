"""How ``lowbit chat`` and ``lowbit generate`` choose tokens: flags, checked like the settings' own.

An option nobody gives keeps the checkpoint's recommendation (generation_config.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowbit.settings import option, options_of

if TYPE_CHECKING:
    from lowbit.engine.messages import SamplingParams

GROUP = "Sampling"


@dataclass
class SamplingOptions:
    """Fields are those of ``SamplingParams``; None: as the checkpoint recommends."""

    max_tokens: int | None = option(None, "Most tokens to write.", GROUP, minimum=1)
    temperature: float | None = option(
        None, "Randomness; 0 always takes the likeliest token.", GROUP, minimum=0, maximum=2
    )
    top_k: int | None = option(None, "Choose among the k likeliest tokens; 0: all.", GROUP, minimum=0)
    top_p: float | None = option(
        None, "Choose among the likeliest tokens of this total probability.", GROUP, minimum=0, maximum=1
    )
    min_p: float | None = option(
        None, "Drop tokens less likely than this share of the likeliest one.", GROUP, minimum=0, maximum=1
    )
    repetition_penalty: float | None = option(
        None, "Above 1: tokens already written become less likely.", GROUP, minimum=0.01, maximum=10
    )
    seed: int | None = option(None, "Seed: the same seed gives the same answer.", GROUP)

    def applied_to(self, recommended: SamplingParams) -> SamplingParams:
        """The recommendation with every option given put in its place."""
        import msgspec

        given = {name: getattr(self, name) for name in options_of(type(self))}
        return msgspec.structs.replace(
            recommended, **{name: value for name, value in given.items() if value is not None}
        )
