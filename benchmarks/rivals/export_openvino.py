"""An F16 GGUF file as OpenVINO's files with 4-bit weights, through its GGUF reader and nncf.

    python export_openvino.py MODEL.gguf OUT_FOLDER GROUP_SIZE

Embedding and head become 8-bit, as nncf leaves them by default. Nothing is fetched.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import nncf
import openvino as ov
import openvino_genai as genai

MODEL = "openvino_model.xml"


def main() -> None:
    source, out, group = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        (folder / "model.gguf").symlink_to(source)
        # The reader leaves its files beside the one it reads.
        genai.LLMPipeline(str(folder / "model.gguf"), "CPU", enable_save_ov_model=True)
        (folder / "model.gguf").unlink()
        model = ov.Core().read_model(folder / MODEL)
        packed = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=group, ratio=1.0
        )
        out.mkdir(parents=True)
        ov.save_model(packed, out / MODEL)
        for file in folder.iterdir():
            if file.stem != Path(MODEL).stem:
                shutil.copy(file, out)


if __name__ == "__main__":
    main()
