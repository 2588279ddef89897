"""What docs/formats.md is made of: every format has a row, and every fixture says who made it.

That it is the page that ``make docs`` makes is in test_docs.py.
"""

from __future__ import annotations

from pathlib import Path

from formats.formats_page import FIXTURES, READS, cases
from formats.tools_that_load import LOADED, warnings
from lowbit.formats import all_formats
from lowbit.formats.writing import all_writers

ROOT = Path(__file__).parents[2]


def test_every_format_has_a_row() -> None:
    assert {fmt.name for fmt in all_formats()} == set(READS)


def test_every_written_format_was_loaded_by_a_tool() -> None:
    """And each row names a test that is there."""
    assert {row.form for row in LOADED} == set(all_writers())
    for row in LOADED:
        file, _, name = row.test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), row
    assert {name for name, writer in all_writers().items() if writer.misread} | {"gptq"} == set(warnings())
    assert all(warnings().values())


def test_fixtures_say_who_made_them() -> None:
    found = cases()
    assert len(found) >= 40
    for folder, about in found:
        assert {"tool", "version", "script", "dequantized_by"} <= set(about), folder
        assert (folder.parent / about["script"]).is_file(), f"{folder}: its script is not there"
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert size <= 200_000, f"{folder} is {size} bytes"
    made = {"quantize", "gguf_blocks"}  # what quantizers are held against; the rest are checkpoints to read
    last = {"torchao", "torchao_experts", "qqq", "squeezellm"}
    later = {"hqq", "pickled", "qserve", "sinq", "eetq", "gguf_layers"}
    grids = {"higgs"}
    codebooks = {"aqlm", "vptq", "exl3", "spqr", "quip_sharp"}
    others = {"mlx", "metal", "quark", "quanto"}
    rotated = {"transforms", "fp_quant", "paroquant"}
    small = {"bitnet", "fouroversix"}
    families = {"gguf_families", "gguf_more_families", "gguf_recurrent_families"}
    for limit, folders in (
        (
            5_500_000,
            [
                folder
                for folder in FIXTURES.iterdir()
                if folder.name
                not in made | later | last | codebooks | grids | others | rotated | small | families
            ],
        ),
        (5_000_000, [FIXTURES / name for name in families]),
        (1_000_000, [FIXTURES / name for name in made]),
        (2_000_000, [FIXTURES / name for name in later]),
        (2_000_000, [FIXTURES / name for name in last]),
        (2_000_000, [FIXTURES / name for name in codebooks]),
        (1_500_000, [FIXTURES / name for name in grids]),
        (2_500_000, [FIXTURES / name for name in others]),
        (2_000_000, [FIXTURES / name for name in rotated]),
        (500_000, [FIXTURES / name for name in small]),
    ):
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") <= limit
