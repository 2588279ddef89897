"""ModelOptions: what settings say of a model's numbers and kernels, whether it is loaded or only planned."""

from __future__ import annotations

from typing import TypedDict

from lowbit.settings import Settings


class ModelOptions(TypedDict):
    """Arguments that ``load_model`` and ``plan_model`` share: so a plan is of the model that is served."""

    device: str
    dtype: str
    kv_cache_dtype: str
    k_cache_dtype: str
    v_cache_dtype: str
    activation_quantization: str
    strict: bool
    kv_scales_path: str | None
    linear_kernel: str
    lm_head_screen: str


def model_options(settings: Settings) -> ModelOptions:
    """The settings' own."""
    return {
        "device": settings.device,
        "dtype": settings.dtype,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "k_cache_dtype": settings.k_cache_dtype,
        "v_cache_dtype": settings.v_cache_dtype,
        "activation_quantization": settings.activation_quantization,
        "strict": settings.strict,
        "kv_scales_path": settings.quantization_param_path,
        "linear_kernel": settings.linear_kernel,
        "lm_head_screen": settings.lm_head_screen,
    }
