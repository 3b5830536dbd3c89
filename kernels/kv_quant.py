"""Keys and values of the full store in 8 bits: one scale for each token and KV head, symmetric, keys and values apart.

    x ~ scale * payload,    scale = max |x| / limit,    payload = int8 (limit 127) or fp8 e4m3 (limit 448)

Keys are quantised after their rotation, as decode reads them. The scale is fp16 and is rounded before the division, so
that only the payload carries a rounding error; with scales in fp32 the error is the same in its first three digits.
Decode steps multiply a key's scale into its score and a value's into its weight (`decode.py`); the prefill reads
`dequantize_kv`. Not for gradients, except through `rounded_kv`.
"""

from __future__ import annotations

import torch

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
KV_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SCALE_DTYPE = torch.float16
TILE = 16_384


def kv_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype | None:
    """The payload of `kv_cache_dtype=name` on `device`; None for "auto", the model's own dtype.

    Raises:
        ValueError: no such name, or fp8 on a GPU that cannot convert it.
    """
    if name == "auto":
        return None
    if name not in KV_DTYPES:
        raise ValueError(f"kv_cache_dtype must be 'auto', 'int8' or 'fp8', got {name!r}")
    device = torch.device(device)
    if name == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ValueError(
                f"kv_cache_dtype='fp8' needs a GPU of compute capability 8.9 or later, this one has "
                f"{capability[0]}.{capability[1]}: use kv_cache_dtype='int8'"
            )
    return KV_DTYPES[name]


def kv_limit(store: torch.Tensor) -> float:
    """The largest payload of a quantised store; 0.0 for any other store."""
    return KV_LIMITS.get(store.dtype, 0.0)


def quantize_kv(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Payload `[..., D]` of `dtype` and scales `[...]` in fp16 of keys or values `[..., D]`; a zero row has scale 0."""
    limit = KV_LIMITS[dtype]
    x = states.float()
    scale = (x.abs().amax(-1) / limit).clamp_max(torch.finfo(SCALE_DTYPE).max).to(SCALE_DTYPE)
    x = x / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    if dtype == torch.int8:
        x = x.round()
    return x.clamp(-limit, limit).to(dtype), scale


def dequantize_kv(payload: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[..., N, D]` of `dtype` from `quantize_kv`'s results: the product in fp32 (`TILE` rows of it), rounded once."""
    out = torch.empty(payload.shape, dtype=dtype, device=payload.device)
    for first in range(0, payload.shape[-2], TILE):
        rows = slice(first, first + TILE)
        out[..., rows, :] = payload[..., rows, :].float() * scale[..., rows, None].float()
    return out


def rounded_kv(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values as they come back from the store, in their own dtype; gradients pass through unchanged."""
    with torch.no_grad():
        rounded = dequantize_kv(*quantize_kv(states, dtype), states.dtype)
    return states + (rounded - states).detach() if states.requires_grad else rounded


def check_kv_scales(
    full_key: torch.Tensor,
    full_value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
) -> None:
    """Raise a `ValueError` unless 8-bit stores `[B, F, C, D]` come with scales `[B, F, C]`, and only they do."""
    for name, store, scale in (("key", full_key, key_scale), ("value", full_value, value_scale)):
        if (store.dtype in KV_LIMITS) != (scale is not None):
            raise ValueError(
                f"a quantised full_{name} needs {name}_scale, and only that does; got a store of {store.dtype} and "
                f"{'no scale' if scale is None else 'a scale'}"
            )
        if scale is not None and (scale.shape != store.shape[:3] or not scale.is_contiguous()):
            raise ValueError(f"{name}_scale must be contiguous {tuple(store.shape[:3])}, got {tuple(scale.shape)}")
    if full_key.dtype != full_value.dtype and (key_scale is not None or value_scale is not None):
        raise ValueError(
            f"keys and values must be quantised alike, got stores of {full_key.dtype} and {full_value.dtype}"
        )
