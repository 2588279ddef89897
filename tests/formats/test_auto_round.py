"""AutoRound's FP8 exports; its other packings are tried with the formats that they are spelled like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from formats.helpers import FIXTURES, fixture_cases, reader_of
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import plan_model


def changed(folder: Path, to: Path, change: dict) -> Path:
    """A copy with other keys in its quantization config."""
    shutil.copytree(folder, to)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (to / "config.json").write_text(json.dumps(config))
    return to


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


# Without what it exported as GPTQ's own.
OWN = [folder for folder in fixture_cases("auto_round") if folder.name != "gptq_mixed"]


@pytest.mark.parametrize("folder", OWN, ids=lambda folder: folder.name)
@pytest.mark.parametrize("key", ["rotation_config", "spinquant_config"])
def test_rotated_exports_are_refused_in_every_packing(key: str, folder: Path, tmp_path: Path) -> None:
    rotation = {"block_size": 32, "hadamard_type": "hadamard"}
    with pytest.raises(LowbitError, match=f"{key}: inputs that AutoRound rotates at run time") as caught:
        reader_of(changed(folder, tmp_path / "rotated", {key: rotation}))
    assert caught.value.code == "E0218"
    assert reader_of(changed(folder, tmp_path / "none", {key: None}), strict=True)
