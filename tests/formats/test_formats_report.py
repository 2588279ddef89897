"""``make formats-report``: what it says of fixtures that are equal, differ, or cannot be made."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.helpers import FIXTURES

SCRIPT = '''"""``python make_it.py OUT [CASE …]``."""

import json
import shutil
import sys
from pathlib import Path

here, out = Path(__file__).parent, Path(sys.argv[1])
for name in sys.argv[2:]:
    if name == "refused":
        print(name, "NOT MADE: no GPU")
        continue
    shutil.copytree(here.parent / "tomorrow" / name, out / name)
'''


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", FIXTURES / "making" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["report"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def group(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four stored fixtures, what the tool would make of them, and the script that copies it."""
    monkeypatch.setattr(report, "FIXTURES", tmp_path)
    for place in ("it", "tomorrow"):
        for name in ("same", "other", "refused"):
            folder = tmp_path / place / name
            folder.mkdir(parents=True)
            numbers = torch.arange(12.0).view(3, 4)
            kind = torch.float32
            if (place, name) == ("tomorrow", "other"):
                numbers[1, 2] += 0.5
                kind = torch.float16
            tensors = {"a": numbers, "b": torch.ones(3, dtype=kind), f"c{name}": torch.ones(1)}
            save_file(tensors, folder / "model.safetensors")
            config = {"bits": 4, "version": 2 if kind == torch.float16 else 1, "transformers_version": place}
            (folder / "config.json").write_text(json.dumps(config))
            about = {"tool": "torch", "version": "0.1", "script": "make_it.py"}
            (folder / "about.json").write_text(json.dumps(about))
    (tmp_path / "it" / "make_it.py").write_text(SCRIPT)
    return tmp_path / "it"


def test_what_it_says(report: ModuleType, group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in group.rglob("*") if path.is_file()}
    assert report.main([]) == 0
    told = capsys.readouterr().out
    assert "equal    it/same (stored by 0.1, here " in told
    assert (
        "differs  it/other" in told and "model.safetensors: a: 1 of 12 numbers differ, by up to 0.5" in told
    )
    assert "b was torch.float32 [3], is torch.float16 [3]" in told
    assert "config.json: version was 1, is 2" in told
    assert "not made it/refused" in told and "NOT MADE: no GPU" in told
    assert told.endswith("1 differs, 1 equal, 1 not made\n")
    assert {path: path.read_bytes() for path in group.rglob("*") if path.is_file()} == before


def test_write(report: ModuleType, group: Path) -> None:
    assert report.main(["it", "--write"]) == 0
    wanted = group.parent / "tomorrow" / "other"
    assert load_file(group / "other" / "model.safetensors")["a"][1, 2] == 6.5
    assert (group / "other" / "config.json").read_bytes() == (wanted / "config.json").read_bytes()
    [found] = [one for one in report.report(group / "make_it.py", {}) if one.fixture == "it/other"]
    assert found.state == "equal"


def test_no_tool(report: ModuleType, group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = group / "make_it.py"
    script.write_text("from modelopt_of_mars.torch import export\nimport auto_round_extension\n" + SCRIPT)
    assert report.main(["--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {one["state"] for one in found} == {"no tool"} and len(found) == 3
    assert "pip install" in found[0]["lines"][0] and "modelopt_of_mars" in found[0]["lines"][0]
    assert report.main(["nowhere"]) == 0
    assert "no such fixtures" in capsys.readouterr().out


def test_every_script_and_fixture_is_known(report: ModuleType) -> None:
    """Each stored fixture belongs to one script; sources that are no package are named.

    Those of ``pickled`` and ``torchao_experts`` lie apart from their script's others, so the report leaves
    them out.
    """
    owned = [(script.parent.name, name) for script in report.scripts() for name in report.fixtures_of(script)]
    assert len(owned) == len(set(owned)) > 90
    stored = {(path.parents[1].name, path.parent.name) for path in FIXTURES.glob("*/*/about.json")}
    assert {group for group, _ in stored - set(owned)} == {"pickled", "torchao_experts"}
    for name in ("make_ggml.py", "make_llama_cpp.py", "make_qserve.py"):
        [script] = FIXTURES.glob(f"*/{name}")
        if not report.missing_packages(script):
            assert "--source" in report.report(script, {})[0].lines[0]
