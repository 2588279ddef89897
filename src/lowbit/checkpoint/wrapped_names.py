"""Names that a wrapper around the model left in a checkpoint: ``module.`` of DataParallel, ``_orig_mod.`` of
torch.compile, those of FSDP, and a ``model.`` of a trainer that holds the whole model.

    module.model.layers.0.mlp.up_proj.weight          every tensor's name begins so
    _orig_mod.model.layers.0.mlp.up_proj.weight       anywhere: a single layer may have been compiled
    model.model.layers.0.mlp.up_proj.weight           every name begins with model., the head's too

Each is plain without it, so nothing is guessed; two tensors of one name are an error. No torch.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.checkpoint.header import TensorEntry
from lowbit.errors import LowbitError, printable

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def without_wrappers(
    tensors: dict[str, TensorEntry], texts: dict[str, object]
) -> tuple[dict[str, TensorEntry], dict[str, object]]:
    """Tensors, and the texts of __metadata__ under tensors' names, by the names of the bare model."""
    names, together = list(tensors), "\n".join(tensors)
    if any(wrapper in together for wrapper in _WRAPPERS):
        names = [_unwrapped(name) for name in names]
    prefix = _prefix(names)
    renamed: dict[str, TensorEntry] = {}
    for unwrapped, (stored, entry) in zip(names, tensors.items(), strict=True):
        name = unwrapped.removeprefix(prefix)
        if name in renamed:
            raise LowbitError(
                "E0226",
                f"{entry.file.name}: tensor {printable(repr(stored))} and another are both "
                f"{printable(repr(name))} without what wrapped the model",
            )
        renamed[name] = entry if name == stored else replace(entry, name=name)
    return renamed, {_unwrapped(name).removeprefix(prefix): text for name, text in texts.items()}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(names: list[str]) -> str:
    """What all names begin with and no model's do."""
    prefix = ""
    while names and all(name.startswith(f"{prefix}module.") for name in names):
        prefix += "module."
    nested = any(name.startswith(f"{prefix}model.model.") for name in names)
    if nested and all(name.startswith(f"{prefix}model.") for name in names):
        prefix += "model."
    return prefix
