"""What tests of model families share: tiny random transformers models, and the comparison of logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from forward_helpers import differences, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.loading import load_model
from lowbit.models.model import Model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def randomized(model: Any, seed: int = 5) -> Any:
    """The model with random weights; no norm is 1, no bias and no correction of a router 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            one = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            parameter.uniform_(0.5, 1.5, generator=generator) if one else parameter.normal_(
                0, 0.15, generator=generator
            )
        for name, buffer in sorted(model.named_buffers()):
            if "correction" in name:
                buffer.uniform_(-0.25, 0.25, generator=generator)
    return model.eval()


def saved(name: str, folder: Path, **values: Any) -> Any:
    """A random model of the transformers class ``<name>ForCausalLM``, saved by it."""
    config = getattr(transformers, f"{name}Config")(**values)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = randomized(getattr(transformers, f"{name}{head}")(config))
    model.save_pretrained(folder)
    return model


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A checkpoint written by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def check_logits(
    path: Path,
    oracle: Callable[[Tensor], Tensor] | Any,
    tolerance: float = 1e-4,
    lengths: tuple[int, ...] = (3, 45, 150),
) -> Model:
    """The checkpoint's logits in float32 against the oracle's, of a transformers model or a function, on
    prompts of these lengths; the model."""
    model = load_model(open_checkpoint(str(path)), device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(2)
    vocabulary = min(131, model.vocab_size)
    prompts = [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    prompts = [prompt[: model.context_length] for prompt in prompts]
    for prompt, logits in zip(prompts, prompt_logits(model, prompts), strict=True):
        with torch.no_grad():
            given = oracle(torch.tensor([prompt]))
        wanted = (given if isinstance(given, Tensor) else given.logits)[0]
        worst = differences(logits, wanted).max()
        assert worst <= tolerance, f"{path.name}: {worst:.2e}"
    return model


def check_stored_logits(folder: Path, name: str, tolerance: float) -> None:
    """A GGUF file's logits in float32 against those that lie beside it."""
    stored = load_file(folder / f"{name}.safetensors")
    model = load_model(open_checkpoint(str(folder / f"{name}.gguf")), device="cpu", dtype="float32")
    [logits] = prompt_logits(model, [stored["tokens"].flatten().tolist()])
    worst = differences(logits, stored["logits"].view(logits.shape)).max()
    assert worst <= tolerance, f"{name}: {worst:.2e} on {sorted(model.kernels)}"
