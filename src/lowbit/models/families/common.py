"""What several families share: tensors nobody needs, and windows."""

from __future__ import annotations

from lowbit.models.config_keys import ConfigKeys

UNUSED = (
    r"(?:.+\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)",  # buffers old exports kept
    r"blk\.\d+\.attn_rot_embd\.weight",
    r"rope_factors_(long|short)\.weight",  # one of the two is used
)


def windows_by_types(types: object, window: int, layers: int, period: int = 1) -> tuple[int, ...]:
    """Each layer's window from its type; without types, every ``period``-th layer sees all tokens."""
    if not (isinstance(types, list) and len(types) == layers):
        types = ["full_attention" if n % period == period - 1 else "sliding_attention" for n in range(layers)]
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


_FIRST_WINDOW = 28  # layer of Qwen's, where the config does not say: as transformers has it


def windows_of(keys: ConfigKeys, layers: int, everywhere: bool = False) -> tuple[int, ...]:
    """Each layer's window from ``layer_types``, or as the family's older configs imply it."""
    if not keys.has("sliding_window"):
        return ()
    window = keys.size("sliding_window")
    types = keys.values.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    if everywhere:
        return (window,) * layers
    first = keys.count("max_window_layers", _FIRST_WINDOW)
    return tuple(window if n >= first else 0 for n in range(layers))
