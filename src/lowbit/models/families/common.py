"""What several families share: tensors nobody needs, and windows."""

from __future__ import annotations

from lowbit.errors import LowbitError, printable
from lowbit.models.config_keys import ConfigKeys

UNUSED = (
    r"(?:.+\.)?rotary_emb\.(?:\w*inv_freq|cos_cached|sin_cached)",  # buffers that some exports keep
    r"blk\.\d+\.attn_rot_embd\.weight",
    r"rope_factors_(long|short)\.weight",  # one of the two is used
)


FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(
    types: object, layers: int, known: tuple[str, ...] = (FULL, SLIDING), key: str = "layer_types"
) -> list[str]:
    """What config.json's ``layer_types``, or another ``key``, list, each of the kinds that are ``known``."""
    if not isinstance(types, list) or len(types) != layers:
        count = len(types) if isinstance(types, list) else "no"
        raise LowbitError(
            "E0216",
            f"config.json: key {key!r} lists {count} layers and the model has {layers}; take the "
            "config of the original model",
        )
    for kind in types:
        if kind not in known:
            raise LowbitError(
                "E0242",
                f"config.json: a layer of type {printable(repr(kind))} is not supported; supported: "
                f"{', '.join(known)}",
            )
    return types


def windows_by_types(types: object, window: int, layers: int, period: int = 1) -> tuple[int, ...]:
    """Each layer's window from its type; without types, every ``period``-th layer sees all tokens."""
    if types is None:
        types = [FULL if n % period == period - 1 else SLIDING for n in range(layers)]
    return tuple(window if kind == SLIDING else 0 for kind in layer_types(types, layers))


def listed_experts(keys: ConfigKeys, layers: int) -> frozenset[int] | None:
    """The layers with experts, as transformers 5 lists them for some families; None where it does not."""
    kinds = keys.values.get("mlp_layer_types")
    if kinds is None:
        return None
    listed = layer_types(kinds, layers, ("dense", "sparse"), key="mlp_layer_types")
    return frozenset(n for n, kind in enumerate(listed) if kind == "sparse")


def require_sigmoid(keys: ConfigKeys) -> None:
    """E0242 where a GGUF file's experts are not chosen by sigmoids (2), which a file need not say."""
    if keys.size("expert_gating_func", 2) != 2:
        raise LowbitError("E0242", f"{keys.place}: only sigmoid routing is supported")


def experts_in_gguf(keys: ConfigKeys) -> tuple[int, int, int, int]:
    """How many experts there are and a token goes to, their width, and that of the shared one."""
    sizes = ("count", "used_count", "feed_forward_length", "shared_feed_forward_length")
    count, used, inner, shared = (keys.size(f"expert_{size}") for size in sizes)
    return count, used, inner, shared


def windows_in_gguf(keys: ConfigKeys, window: int, layers: int, period: int) -> tuple[int, ...]:
    """Each layer's window in a GGUF file, whose ``attention.sliding_window_pattern`` lists the layers that
    have one or says how often one has none: every ``period``-th where there is no such key."""
    key = "attention.sliding_window_pattern"
    told = keys.values.get(key)
    if not isinstance(told, list):
        return windows_by_types(None, window, layers, keys.size(key, period))
    if len(told) < layers:
        raise LowbitError(
            "E0216",
            f"{keys.place}.{key} lists {len(told)} layers and the model has {layers}; the file is damaged",
        )
    return tuple(window if inside else 0 for inside in told[:layers])


_FIRST_WINDOW = 28  # layer of Qwen's, where the config does not say: as transformers has it


def windows_of(keys: ConfigKeys, layers: int, everywhere: bool = False, absent: int = 0) -> tuple[int, ...]:
    """Each layer's window from ``layer_types``, or as the family's older configs imply it; ``absent``: the
    window where config.json has no such key."""
    window = keys.count("sliding_window", 0) if "sliding_window" in keys.values else absent
    if not window:
        return ()
    if keys.has("layer_types"):
        return windows_by_types(keys.values["layer_types"], window, layers)
    if everywhere:
        return (window,) * layers
    first = keys.count("max_window_layers", _FIRST_WINDOW)
    return tuple(window if n >= first else 0 for n in range(layers))
