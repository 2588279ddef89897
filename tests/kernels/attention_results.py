"""What attention gives under this instruction set, many rows and few; as a script, into a file."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from attention_helpers import BF16, assert_equal_bits, draw, latent_of, plain, simulate, spec_of, whole
from lowbit.kernels.attention import CacheSpec
from lowbit.numerics.cache_format import KvDtype

# Rows of one tile and of several, depths that end within a tile, groups of scales within and over lines of A.
CASES: dict[str, tuple[CacheSpec, int, dict[str, Any]]] = {
    "64, groups of 3": (spec_of(1, 64), 3, {}),
    "k 80, v 112, window": (spec_of(1, 80, 112, BF16, 37), 2, {}),
    "int8": (spec_of(1, 64, dtype=KvDtype.of("int8")), 2, {"softcap": 3.0}),
    "int4, 96": (spec_of(1, 96, dtype=KvDtype.of("int4")), 3, {}),
    "int4, 80": (spec_of(1, 80, dtype=KvDtype.of("int4")), 1, {}),
    "e5m2": (spec_of(1, 48, dtype=KvDtype.of("fp8_e5m2")), 4, {"sinks": torch.tensor([1.0, 0.0, -9.0, 9.0])}),
    "latent int8": (latent_of(96, 48, KvDtype.of("int8")), 18, {}),
}
LENGTHS = [5, 300]


def results() -> dict[str, np.ndarray]:
    """name -> outputs of whole sequences; the last tokens, one at a time, have the same bits."""
    made = {}
    for name, (spec, group, extra) in CASES.items():
        parameters = replace(plain(spec), **extra)
        sequences = draw(spec, group, LENGTHS)
        outputs = simulate(spec, sequences, whole(sequences), parameters)
        steps = [[(owner, 0, length - 2) for owner, length in enumerate(LENGTHS)]]
        steps += [
            [(owner, length - left, length - left + 1) for owner, length in enumerate(LENGTHS)]
            for left in (2, 1)
        ]
        assert_equal_bits(simulate(spec, sequences, steps, parameters, seed=1), outputs)
        made[name] = torch.cat(outputs).numpy()
    return made


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())
