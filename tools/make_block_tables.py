"""Write src/lowbit/numerics/block_tables.py from the grids the ``gguf`` package holds.

    python tools/make_block_tables.py > src/lowbit/numerics/block_tables.py

A grid is a list of vectors of 4 or 8 small numbers; each number is stored as its index in the grid's list
of distinct values, 2 or 4 bits each, low bits first, and the whole as base64.
"""

from __future__ import annotations

import base64

import gguf.quants
import numpy as np

HEADER = '''"""Lattice grids of the GGUF IQ types, made by tools/make_block_tables.py (see there)."""

from __future__ import annotations

# name: (vectors, numbers in a vector, bits an index, distinct values, packed indices in base64)
GRIDS: dict[str, tuple[int, int, int, tuple[int, ...], str]] = {'''


def main() -> None:
    print(HEADER)
    for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"):
        kind = getattr(gguf.quants, name)
        kind.init_grid()
        grid = np.asarray(kind.grid).reshape(kind.grid.shape[-2:]).astype(int)
        values = sorted(set(grid.ravel().tolist()))
        bits = 2 if len(values) <= 4 else 4
        indices = np.searchsorted(values, grid.ravel())
        per_byte = 8 // bits
        packed = np.zeros(indices.size // per_byte, np.uint8)
        for slot in range(per_byte):
            packed |= (indices[slot::per_byte] << (bits * slot)).astype(np.uint8)
        text = base64.b64encode(packed.tobytes()).decode()
        print(f'    "{name}": ({grid.shape[0]}, {grid.shape[1]}, {bits}, {tuple(values)}, (')
        for start in range(0, len(text), 96):
            print(f'        "{text[start : start + 96]}"')
        print("    )),")
    print("}")


if __name__ == "__main__":
    main()
