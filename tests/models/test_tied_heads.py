"""A head that is stored though the config ties it: a copy of the embedding costs nothing, another counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.helpers import FIXTURES
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert

PROMPT = [3, 7, 2, 5, 13, 11, 2]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def made(folder: Path, source: str, tied: bool, head: object) -> Path:
    """A fixture with this head: a tensor, a "copy" of all the embedding is, or None."""
    folder.mkdir()
    config = json.loads((FIXTURES / source / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor
        for name, tensor in load_file(FIXTURES / source / "model.safetensors").items()
        if not name.startswith("lm_head.")
    }
    if head == "copy":
        stem = EMBEDDING.removesuffix("weight")
        tensors |= {f"lm_head.{n.removeprefix(stem)}": t for n, t in tensors.items() if n.startswith(stem)}
    elif isinstance(head, Tensor):
        tensors[HEAD] = head
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path) -> Tensor:
    model = load_model(open_checkpoint(str(folder)), device="cpu", kv_cache_dtype="f32")
    return prompt_logits(model, [PROMPT])[0]


def other_head() -> Tensor:
    shape = load_file(FIXTURES / "gptq" / "w4_sym" / "model.safetensors")[EMBEDDING].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).half()


@pytest.mark.parametrize(
    "source", ["gptq/w4_sym", "awq/gemm", "bitsandbytes/nf4", "mlx/4_g64", "fp8/block_128"]
)
def test_a_copy_of_the_embedding_is_the_embedding(source: str, tmp_path: Path) -> None:
    """Quantized embeddings (MLX) too, with all that belongs to them."""
    without = made(tmp_path / "without", source, True, None)
    copy = made(tmp_path / "copy", source, True, "copy")
    plan = plan_model(open_checkpoint(str(copy)), strict=True)
    assert not any("lm_head" in module.name for module in plan.modules)
    assert torch.equal(logits(copy), logits(without))


def test_another_head_is_the_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    untied = made(tmp_path / "untied", "gptq/w4_sym", False, other_head())
    tied = made(tmp_path / "tied", "gptq/w4_sym", True, other_head())
    plan_model(open_checkpoint(str(untied)), strict=True)
    assert torch.equal(logits(tied), logits(untied))
    assert "E0214" in caplog.text and "another head is stored" in caplog.text
    with pytest.raises(LowbitError, match="E0214.*tie_word_embeddings"):
        plan_model(open_checkpoint(str(tied)), strict=True)


def test_one_byte_makes_another_head(tmp_path: Path) -> None:
    """In the last row, behind the first piece that is compared."""
    head = load_file(FIXTURES / "gptq" / "w4_sym" / "model.safetensors")[EMBEDDING].clone()
    head[-1, -1] += 1
    plan = plan_model(open_checkpoint(str(made(tmp_path / "m", "gptq/w4_sym", True, head))))
    assert any("lm_head" in module.name for module in plan.modules)


@pytest.mark.parametrize("own", [False, True])
def test_converted(own: bool, tmp_path: Path) -> None:
    """The copy is left out; another head stays, and the config no longer says that there is none."""
    folder = made(tmp_path / "in", "gptq/w4_sym", True, other_head() if own else "copy")
    before = logits(folder)
    convert(open_checkpoint(str(folder)), "compressed-tensors", tmp_path / "out")
    written = open_checkpoint(str(tmp_path / "out"))
    assert (HEAD in written.tensors) == own
    assert written.config["tie_word_embeddings"] is not own
    assert torch.equal(logits(tmp_path / "out"), before)
