"""``lowbit convert`` from the command line."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest

from formats.helpers import FIXTURES
from lowbit.checkpoint import open_checkpoint
from lowbit.cli import main
from lowbit.tokenization import load_tokenizer

GPTQ = FIXTURES / "gptq" / "w4_sym"


def test_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(GPTQ), "--format", "dense", "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "out: dense, " in told and "bf16: largest relative rounding 0." in told
    assert main(words) == 7
    assert "E0302" in capsys.readouterr().err
    assert main([*words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bf16"


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        ("hqq/4_g32", "hqq", "transformers 4 with the hqq package loads it"),
        ("sglang/w8a8_int8", "w8a8_int8", "w8a8_int8 is SGLang's; transformers does not know it"),
        ("sglang/w8a8_fp8", "w8a8_fp8", "The same numbers for transformers: --format compressed-tensors"),
        ("sglang/blockwise_int8", "blockwise_int8", "takes the codes for weights, without their scales"),
        ("modelopt/fp8", "modelopt", "For transformers: --format compressed-tensors"),
        ("modelopt/fp8", "fp8", "vLLM and SGLang know scales of whole tensors as weight_scale"),
    ],
)
def test_says_which_tool_misreads_it(
    name: str, form: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the terminal, in --json and in the certificate."""
    out = tmp_path / "out"
    command = ["convert", str(FIXTURES / name), "--format", form, "--out", str(out)]
    assert main(command) == 0
    assert words in capsys.readouterr().out
    assert main([*command, "--force", "--json"]) == 0
    [note] = json.loads(capsys.readouterr().out)["notes"]
    assert words in note
    assert json.loads((out / "lowbit-conversion.json").read_text())["notes"] == [note]


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (["--out", "x"], "E0104", 2),
        (["--format", "dense"], "E0104", 2),
        (["--format", "parquet", "--out", "x"], "--format parquet: not written; written are awq, ", 4),
        (["--format", "GPTQ", "--out", "x"], "not written; did you mean gptq? Written are awq, ", 4),
        (["--format", "dense", "--out", "x", "--dtype", "int3"], "E0103", 2),
    ],
)
def test_refusals(
    words: list[str], code: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / word) if word == "x" else word for word in words]
    assert main(["convert", str(GPTQ), *words]) == status
    assert code in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_folder_one_is_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty folder may be there, but its place is taken by another one: a shell would be in none."""
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(GPTQ), "--format", "dense", "--out", str(tmp_path / "empty")]) == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["convert", str(GPTQ), "--format", "dense", "--out", "."]) == 7
    assert "is where you are; name a folder in it" in capsys.readouterr().err
    assert main(["convert", str(GPTQ), "--format", "dense", "--out", "model"]) == 0


def test_source_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in GPTQ.iterdir()}
    assert main(["convert", str(GPTQ), "--format", "dense", "--out", str(GPTQ), "--force"]) == 7
    assert "is what is being read" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in GPTQ.iterdir()} == before


def test_files_may_not_be_so_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a disk of format FAT: nothing is kept, and the way out is said."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        status = main(["convert", str(GPTQ), "--format", "dense", "--out", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert status != 0 and "E0300" in told and "no file may be so large there" in told
    assert not list(tmp_path.iterdir())


def test_what_people_and_tools_expect_beside_the_weights(tmp_path: Path) -> None:
    """Model card, licences, generation config, templates, preprocessors: byte for byte. No code, no weights,
    nothing of the source's quantization."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "quantize_config.json"):
        shutil.copy(GPTQ / name, source)
    copied = {
        *("README.md", "LICENSE", "LICENSE.Apache-2.0", "Notice.txt", "USE_POLICY.md"),
        *("generation_config.json", "tokenizer_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json"),
        *("processor_config.json", "video_preprocessor_config.json"),
    }
    left = {
        *("modeling_own.py", "LICENSE.py", "README.ipynb", "licenses.tar", "training_args.bin", "notice.pt"),
        *("pytorch_model.bin.index.json", "quant_config.json", ".gitattributes", "figures/README.md"),
    }
    for name in copied | left:
        (source / name).parent.mkdir(exist_ok=True)
        text = "{}" if name.endswith(".json") else f"{name} \N{COPYRIGHT SIGN}\r\n"
        (source / name).write_bytes(text.encode())
    assert main(["convert", str(source), "--format", "compressed-tensors", "--out", str(out)]) == 0
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == copied | {"config.json", "model.safetensors", "lowbit-conversion.json"}
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--format", "compressed-tensors"], True),
        (["--format", "dense"], True),
        (["--format", "dense", "--dtype", "float16"], False),
        (["--format", "compressed-tensors", "--requantize", "nvfp4"], True),  # which holds all as it is
        (["--format", "bitsandbytes", "--requantize"], False),
    ],
)
def test_what_was_measured_goes_only_where_it_holds(
    flags: list[str], kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(GPTQ, source)
    measured = {"mean_kl": 0.01, "top1_agreement": 0.97, "positions": 4096, "against": "the bf16 original"}
    (source / "quality.json").write_text(json.dumps(measured))
    assert main(["convert", str(source), *flags, "--out", str(out)]) == 0
    assert (out / "quality.json").exists() == kept, capsys.readouterr()


def test_what_belongs_to_other_weights_stays_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SINQ's words about each module, an adapter's, the authors' layout; code is said to be left out."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(FIXTURES / "sinq" / "4_g32", source)
    for name in ("adapter_config.json", "params.json"):
        (source / name).write_text("{}")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(source), "--format", "dense", "--out", str(out)]) == 0
    assert "the model's own code (auto_map in config.json) was left out" in capsys.readouterr().out
    left = {path.name for path in out.iterdir()} & {path.name for path in source.iterdir()}
    assert left <= {"config.json", "model.safetensors", "about.json"}


def test_another_tokenizer_goes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--tokenizer``, as the error of a model without one says, into a file and into a folder."""
    original = FIXTURES / "gguf_families" / "qwen3.gguf"
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    for folder in (whole, bare):
        assert main(["convert", str(original), "--format", "dense", "--out", str(folder)]) == 0
    for path in bare.glob("*token*"):
        path.unlink()
    words = ["convert", str(bare), "--format", "gguf", "--out", str(tmp_path / "out.gguf")]
    assert main(words) != 0
    assert "pass --tokenizer" in capsys.readouterr().err
    assert main([*words, "--tokenizer", str(whole)]) == 0
    words = ["convert", str(bare), "--format", "dense", "--out", str(tmp_path / "folder")]
    assert main([*words, "--tokenizer", str(original)]) == 0
    wanted = load_tokenizer(open_checkpoint(str(original)))
    for result in (tmp_path / "out.gguf", tmp_path / "folder"):
        found = load_tokenizer(open_checkpoint(str(result)))
        assert found.encode("the hour and  an ant\n") == wanted.encode("the hour and  an ant\n")


def test_a_tokenizer_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(GPTQ), "--format", "dense", "--out", str(tmp_path / "out")]
    assert main([*words, "--tokenizer", "smollm2"]) != 0
    assert "belongs to another model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
