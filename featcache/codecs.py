"""Features <=> stored bytes. Pure torch: runs on the GPU and compiles into the training step.

What travels to the GPU is what is stored; decoding happens there. A codec stores one tensor, or two where it
needs scales (suffix `.scale`). Per-sample shapes are `[..., C]`; a "token" is one vector over the last axis.

| codec | stored | bytes per value | scale |
| --- | --- | --- | --- |
| `raw` | any numpy dtype as it is | its own | - |
| `fp32` | float32 | 4 | - |
| `fp16` | float16, saturating at +-65504 | 2 | - |
| `bf16` | bfloat16 bits in uint16 | 2 | - |
| `int8` | int8 in [-127, 127] | 1 | float32 per token: max\\|x\\| / 127 |
| `fp8` | float8 e4m3fn bits in uint8 | 1 | float32 per token: max\\|x\\| / 448 |
| `int4` | two values per byte, low nibble first, q + 8 | 0.5 | float16 per group of 32: max\\|x\\| / 7 |

The symmetric absmax quantisation, the group of 32 and the choice of float32 scales for tokens and float16
for groups are ours; the papers store nothing. Any codec but `raw` may store coefficients in a linear basis instead of the
tokens themselves (`featcache.store.basis`): `FeatureCodec` knows both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.store.basis import Basis
from featcache.store.layout import CODECS, INT4_GROUP, SCALE_SUFFIX, stored_arrays
from featcache.store.manifest import FeatureSpec

__all__ = ["CODECS", "INT4_GROUP", "SCALE_SUFFIX", "decode", "encode", "stored_arrays"]

_FP16_MAX = 65504.0
_FP8_MAX = 448.0  # largest finite float8_e4m3fn


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise UserError(f"there is no codec {codec!r}", remedy=f"use one of {', '.join(CODECS)}")


def _scaled(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """`x / scale` and `scale = max|x| / limit` over the last axis; an all-zero vector has scale 0 and stays zero."""
    scale = x.abs().amax(dim=-1, keepdim=True) / limit
    # A scale that underflows to 0 must not divide; the values are then below 1e-40 and stored as 0.
    return x / torch.where(scale > 0, scale, torch.ones_like(scale)), scale


def encode(codec: str, x: Tensor) -> dict[str, Tensor]:
    """Stored tensors by suffix ('' and, for scaled codecs, '.scale') of the features `x` `[B, *shape]`.

    Shapes and dtypes are those of `stored_arrays(codec, shape)` with `B` in front. Non-finite values are the
    caller's to find: NaN makes a token NaN (fp formats) or undefined (integer formats).

    Raises `UserError` for an unknown codec or a shape that it cannot hold.
    """
    _check_codec(codec)
    if codec == "raw":
        return {"": x}
    stored_arrays(codec, tuple(x.shape[1:]))
    x = x.float()
    if codec == "fp32":
        return {"": x}
    if codec == "fp16":
        # Saturate: an infinity would poison every sum it enters, a value of 65504 only its own.
        return {"": x.clamp(-_FP16_MAX, _FP16_MAX).half()}
    if codec == "bf16":
        return {"": x.bfloat16().view(torch.uint16)}
    if codec == "int8":
        q, scale = _scaled(x, 127.0)
        return {"": q.round().clamp(-127, 127).to(torch.int8), SCALE_SUFFIX: scale.squeeze(-1)}
    if codec == "fp8":
        q, scale = _scaled(x, _FP8_MAX)
        # The cast of values above 448 is NaN in e4m3fn, and x / scale may round to just above.
        q = q.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        return {"": q.view(torch.uint8), SCALE_SUFFIX: scale.squeeze(-1)}
    groups = x.unflatten(-1, (-1, INT4_GROUP))  # [B, ..., C / 32, 32]
    # Quantise with the scale as it is stored (rounded to float16), so that decoding inverts exactly this step.
    scale = (groups.abs().amax(dim=-1) / 7.0).clamp(max=_FP16_MAX).half()  # [B, ..., C / 32]
    divisor = scale.float().unsqueeze(-1)
    q = groups / torch.where(divisor > 0, divisor, torch.ones_like(divisor))
    q = torch.where(divisor > 0, q.round().clamp(-7, 7), torch.zeros_like(q)) + 8.0
    q = q.to(torch.uint8).flatten(-2)  # [B, ..., C]
    return {"": q[..., 0::2] | (q[..., 1::2] << 4), SCALE_SUFFIX: scale}


def decode(
    codec: str, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The features `[B, *shape]` in `dtype` from the stored tensors of `encode`.

    The arithmetic is float32, rounded once to `dtype` at the end. `raw` returns what is stored, unchanged.

    Raises `UserError` for an unknown codec.
    """
    _check_codec(codec)
    values = stored[""]
    if codec == "raw":
        return values
    if codec in ("fp32", "fp16"):
        return values.to(dtype)
    if codec == "bf16":
        return values.view(torch.bfloat16).to(dtype)
    scale = stored[SCALE_SUFFIX].float()
    if codec == "int8":
        return (values.float() * scale.unsqueeze(-1)).to(dtype)
    if codec == "fp8":
        return (values.view(torch.float8_e4m3fn).float() * scale.unsqueeze(-1)).to(dtype)
    nibbles = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)  # [B, ..., C]
    q: Tensor = nibbles.float().unflatten(-1, (-1, INT4_GROUP)) - 8.0
    return (q * scale.unsqueeze(-1)).flatten(-2).to(dtype)


class LinearBasis(nn.Module):
    """Tokens <=> coefficients of variance 1, see `featcache.store.basis`. Buffers are float32 and not saved.

    Args:
        shape: of the feature, `[T, C]` or `[L, T, C]`.
    """

    mean: Tensor
    scale: Tensor
    vectors: Tensor

    def __init__(self, basis: Basis, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.rank, self._layers = basis.rank, shape[0] if len(shape) == 3 else None
        for name, values in zip(("mean", "scale", "vectors"), basis.arrays()):
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)), persistent=False)

    def project(self, x: Tensor) -> Tensor:
        """`[B, *shape]` => coefficients `[B, T, K]`, float32: the nearest in the basis."""
        tokens = x.float() if self._layers is None else x.float().transpose(1, 2).flatten(2)  # [B, T, D]
        along: Tensor = (tokens - self.mean) @ self.vectors.T
        return along / self.scale

    def expand(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """Coefficients `[B, T, K]` => `[B, *shape]` in `dtype`, multiplied in it and summed in float32."""
        B, T, K = coefficients.shape
        along = (coefficients * self.scale).reshape(B * T, K)
        flat = torch.addmm(self.mean.to(dtype), along.to(dtype), self.vectors.to(dtype))
        if self._layers is None:
            return flat.view(B, T, -1)
        return flat.view(B, T, self._layers, -1).transpose(1, 2)


class FeatureCodec(nn.Module):
    """How one feature becomes stored bytes and comes back. Without a basis it holds no tensors.

    `decode` compiles into the training step.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.name, self.codec = spec.name, spec.codec
        self.basis = None if spec.basis is None else LinearBasis(spec.basis, spec.shape)
        self._shape, self._suffixes = tuple(spec.shape), tuple(spec.stored)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the stored arrays."""
        return tuple(self.name + suffix for suffix in self._suffixes)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Features `[B, *shape]` => stored tensors by suffix, as `encode`."""
        return encode(self.codec, x if self.basis is None else self.basis.project(x))

    def decode(self, batch: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored arrays of a batch, by the arrays' names => `[B, *shape]` in `dtype` (raw ones as they are)."""
        stored = {suffix: batch[name] for suffix, name in zip(self._suffixes, self.arrays)}
        if self.basis is None:
            return decode(self.codec, stored, self._shape, dtype)
        coefficients = decode(self.codec, stored, (self._shape[-2], self.basis.rank))
        return self.basis.expand(coefficients, dtype)


def numpy_view(tensor: Tensor) -> np.ndarray:
    """A stored tensor as the numpy array that the store writes (no copy on the CPU)."""
    return tensor.detach().cpu().contiguous().numpy()
