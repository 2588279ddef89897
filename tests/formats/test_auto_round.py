"""AutoRound's FP8 exports; its other packings are tried with the formats that they are spelled like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from formats.helpers import FIXTURES
from lowbit.checkpoint import open_checkpoint
from lowbit.loading import plan_model


def test_a_static_export_that_does_not_say_so_again(tmp_path: Path) -> None:
    """Its packing's name tells that inputs have a stored scale."""
    folder, copied = FIXTURES / "auto_round" / "fp8_static", tmp_path / "model"
    shutil.copytree(folder, copied)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["act_dynamic"]
    (copied / "config.json").write_text(json.dumps(config))
    plans = [plan_model(open_checkpoint(str(path)), device="cpu") for path in (folder, copied)]
    told, silent = ([str(module.scheme) for module in plan.modules] for plan in plans)
    assert told == silent and any("static" in scheme for scheme in told)
