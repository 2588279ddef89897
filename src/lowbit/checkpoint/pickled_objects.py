"""What pickled files hold beside plain tensors, taken apart: torchao's tensor subclasses and HQQ's layers.

    torchao   X.weight is an object of a class that wraps tensors; in a safetensors file the same object is
              tensors X._weight_<part> and a text under X.weight in __metadata__:
              {"_type": class, "_data": {its other attributes}}. Here it becomes just that.
    HQQ       qmodel.pt has a dictionary for each module: its tensors, and Python values beside them.
              They become tensors MODULE.<key> and a text under MODULE: {"hqq": {key: value}}.

Values become JSON: an object {"_type": class, "_data": attributes}, a member of an enum its name, a dtype
{"_type": "torch.dtype", "_data": name}. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from lowbit.checkpoint.pickle_stream import Name, PickledObject, PickledTensor

# Enums of torchao that are pickled by number.
_MEMBERS = {"MappingType": {1: "SYMMETRIC", 2: "SYMMETRIC_NO_CLIPPING_ERR", 3: "ASYMMETRIC"}}
_LARGEST = 4096  # values of one object; a pickle may refer to the same list again and again
_DEEPEST = 16  # of them in each other; a list may hold itself


def flatten(found: dict[object, object]) -> tuple[dict[object, object], dict[str, object]]:
    """(tensors, texts of __metadata__): nothing that is a plain tensor, or unknown, changes.

    ValueError where two of the file's values would have one name.
    """
    tensors: dict[object, object] = {}
    texts: dict[str, object] = {}
    made: Mapping[object, object]
    by_hqq = any(isinstance(value, dict) and "W_q" in value for value in found.values())
    for name, value in found.items():
        if isinstance(value, PickledObject) and isinstance(name, str):
            parts, rest = _parts(value.attributes)
            stem, _, leaf = name.rpartition(".")
            made = {f"{stem}._{leaf}_{part}": tensor for part, tensor in parts.items()}
            texts[name] = json.dumps({"_type": value.kind, "_data": rest})
        elif by_hqq and isinstance(value, dict) and isinstance(name, str):
            parts, rest = _parts(_beneath(value))
            made = {f"{name}.{part}": tensor for part, tensor in parts.items()}
            if rest:
                texts[name] = json.dumps({"hqq": rest})
        else:
            made = {name: value}
        if twice := tensors.keys() & made.keys():
            raise ValueError(f"{next(iter(twice))!r} is there twice")
        tensors |= made
    return tensors, texts


def owner(tensor: str, texts: dict[str, object]) -> str:
    """The name in the file of what ``flatten`` made this tensor of: its own, if it was one."""
    stem, _, part = tensor.rpartition("._")
    whole = f"{stem}.{part.partition('_')[0]}"
    return whole if stem and whole in texts else tensor


def _beneath(values: dict[object, object]) -> dict[object, object]:
    """An HQQ layer's values; older versions keep all but W_q and bias in a dictionary of their own."""
    inner = values.get("meta")
    if not isinstance(inner, dict):
        return values
    return {key: value for key, value in values.items() if key != "meta"} | inner


def _parts(values: dict[object, object]) -> tuple[dict[str, PickledTensor], dict[str, object]]:
    parts = {str(key): value for key, value in values.items() if isinstance(value, PickledTensor)}
    rest, left = {}, _LARGEST
    for key, value in values.items():
        if str(key) not in parts:
            rest[str(key)], left = _plain(value, left, _DEEPEST)
    return parts, rest


def _plain(value: object, left: int, depth: int) -> tuple[object, int]:
    """(the value as JSON has it, how many more there may be); what JSON has not is named by its type."""
    left -= 1
    if value is None or isinstance(value, bool | int | float | str):
        return value, left
    if left <= 0 or depth <= 0:
        return "…", left
    if isinstance(value, list | tuple):
        made = []
        for one in value[:left]:
            plain, left = _plain(one, left, depth - 1)
            made.append(plain)
        return made, left
    if isinstance(value, dict):
        found: dict[str, object] = {}
        for key, one in list(value.items())[:left]:
            found[str(key)], left = _plain(one, left, depth - 1)
        return found, left
    if isinstance(value, Name):
        short = value.full.removeprefix("torch.")
        is_dtype = short != value.full and "." not in short
        return ({"_type": "torch.dtype", "_data": short} if is_dtype else short.rpartition(".")[2]), left
    if isinstance(value, PickledObject):
        if not value.attributes and len(value.values) == 1:  # a member of an enum
            [member] = value.values
            names = _MEMBERS.get(value.kind, {})
            inner = names.get(member, member) if isinstance(member, int) else member
        else:
            inner = value.attributes
        plain, left = _plain(inner, left, depth - 1)
        return {"_type": value.kind, "_data": plain}, left
    return type(value).__name__, left
