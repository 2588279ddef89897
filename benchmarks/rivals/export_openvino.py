"""A GGUF file as OpenVINO's files, through its GGUF reader; with a group size as 4-bit weights through nncf.

    python export_openvino.py MODEL.gguf OUT_FOLDER [GROUP_SIZE]

nncf takes an F16 file; embedding and head become 8-bit, as it leaves them by default. Nothing is fetched.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import openvino as ov
import openvino_genai as genai

MODEL = "openvino_model.xml"


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        (folder / "model.gguf").symlink_to(source)
        # The reader leaves its files beside the one it reads.
        genai.LLMPipeline(str(folder / "model.gguf"), "CPU", enable_save_ov_model=True)
        (folder / "model.gguf").unlink()
        out.mkdir(parents=True)
        if groups := sys.argv[3:]:
            compress(folder / MODEL, out / MODEL, int(groups[0]))
        for file in folder.iterdir():
            if not (groups and file.stem == Path(MODEL).stem):
                shutil.copy(file, out)


def compress(source: Path, out: Path, group: int) -> None:
    """4-bit weights with zero points, all of them."""
    import nncf

    mode = nncf.CompressWeightsMode.INT4_ASYM
    model = ov.Core().read_model(source)
    ov.save_model(nncf.compress_weights(model, mode=mode, group_size=group, ratio=1.0), out)


if __name__ == "__main__":
    main()
