"""ExLlama: what the readers of ExLlamaV2's and ExLlamaV3's checkpoints have in common.

The tensors say everything; a config, which a checkpoint may lack, is asked for its bits alone, for people.
"""

from __future__ import annotations

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.formats import Notes, require_tensors
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import quantization_config


class ExLlama(PartlyDense):
    """``place``: where the config is, or the words that there is none."""

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header = header
        found = quantization_config(header)
        self.place = "its tensors" if found is None else found.place
        self.bits = None if found is None else found.values.get("bits")
        require_tensors(header, (f".{self.sign}",), self.place, self.name)

    def describe(self) -> str:
        """Bits a weight as the config has them: ``exl2, 4.5 bits (from config.json)``."""
        bits = f", {self.bits:g} bits" if isinstance(self.bits, int | float) else ""
        return f"{self.name}{bits} (from {self.place.split(':')[0]})"
