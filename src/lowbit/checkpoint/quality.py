"""quality.json: what somebody measured of a quantized model, beside its files. Passed on, never guessed.

    {"mean_kl": 0.0123, "top1_agreement": 0.971, "positions": 4096, "against": "the bf16 original"}

``mean_kl``: the mean Kullback-Leibler divergence, in nats, of the model's next-token distributions from those
of ``against``, over ``positions`` tokens of text; ``top1_agreement``: the share of them where both name the
same token first. A folder's file is ``quality.json``; that of a GGUF file is ``NAME.quality.json``, or
``quality.json`` where no other GGUF file lies beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable

NAME = "quality.json"
_KEYS = ("mean_kl", "top1_agreement", "positions", "against")


@dataclass(frozen=True)
class Quality:
    """See the module docstring."""

    mean_kl: float
    top1_agreement: float
    positions: int
    against: str

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.4g}, {self.top1_agreement:.1%} same first token, "
            f"over {self.positions} positions against {printable(self.against)}"
        )


def read_quality(header: CheckpointHeader) -> Quality | None:
    """What was measured of this checkpoint; None where there is no file. E0227: it has another form."""
    name = NAME
    if header.container == "gguf":
        own = f"{header.root.stem}.{NAME}"
        alone = len(list(header.root.parent.glob("*.gguf"))) == 1
        if not alone or (header.root.parent / own).exists():
            name = own
    values = read_json(header, name)
    return None if values is None else _checked(values, name)


def _checked(values: Mapping[str, object], name: str) -> Quality:
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise LowbitError("E0227", f"{name} has no {missing[0]!r}; it needs {', '.join(_KEYS)}")
    mean_kl, agreement, positions, against = (values[key] for key in _KEYS)
    if not (_is_number(mean_kl) and mean_kl >= 0):
        raise _wrong(name, "mean_kl", "a number from 0", mean_kl)
    if not (_is_number(agreement) and 0 <= agreement <= 1):
        raise _wrong(name, "top1_agreement", "a number from 0 to 1", agreement)
    if not isinstance(positions, int) or isinstance(positions, bool) or positions < 1:
        raise _wrong(name, "positions", "a whole number from 1", positions)
    if not isinstance(against, str) or not 0 < len(against) <= 200:
        raise _wrong(name, "against", "a text of 1 to 200 letters", against)
    return Quality(float(mean_kl), float(agreement), positions, against)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, key: str, needs: str, found: object) -> LowbitError:
    return LowbitError("E0227", f"{name}: {key} must be {needs}, got {printable(repr(found))}")
