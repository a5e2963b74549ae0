"""Codecs against formulas written a second way in float64 numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.codecs import decode, encode
from featcache.errors import UserError
from featcache.store.layout import CODECS, stored_arrays

LOSSY = ("fp16", "bf16", "int8", "fp8", "int4")


def tokens(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Heavy tails, as real encoder tokens have.
    return scale * torch.randn(shape, generator=generator) * (1 + torch.randn(shape, generator=generator) ** 2)


def fp8_values() -> np.ndarray:
    """All 256 values of e4m3fn from its definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no
    infinities.
    """
    codes = np.arange(256)
    sign, exponent, mantissa = 1 - 2 * (codes >> 7), (codes >> 3) & 15, codes & 7
    normal = sign * 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    subnormal = sign * 2.0**-6 * (mantissa / 8)
    values = np.where(exponent == 0, subnormal, normal)
    values[(exponent == 15) & (mantissa == 7)] = np.nan
    return values


@pytest.mark.parametrize("codec", [c for c in CODECS if c != "raw"])
@pytest.mark.parametrize("shape", [(64,), (5, 32), (3, 4, 96)])
def test_stored_arrays_and_roundtrip_shapes(codec: str, shape: tuple[int, ...]) -> None:
    x = tokens(0, 2, *shape)
    stored = encode(codec, x)
    expected = stored_arrays(codec, shape)
    assert {s: (t.numpy().dtype, tuple(t.shape)) for s, t in stored.items()} == {
        s: (dtype, (2, *stored_shape)) for s, (dtype, stored_shape) in expected.items()
    }
    for dtype in (torch.float32, torch.bfloat16):
        back = decode(codec, stored, shape, dtype)
        assert back.shape == x.shape
        assert back.dtype == dtype


def test_float_codecs_equal_numpy() -> None:
    x = tokens(1, 7, 33, scale=100.0)
    assert torch.equal(decode("fp32", encode("fp32", x), (33,)), x)
    assert np.array_equal(encode("fp16", x)[""].numpy(), x.numpy().astype(np.float16))
    # bfloat16 by hand: round float32 to nearest even at bit 16.
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(encode("bf16", x)[""].numpy(), rounded)
    assert np.array_equal(
        decode("bf16", encode("bf16", x), (33,)).numpy(), (rounded.astype(np.uint32) << 16).view(np.float32)
    )


def test_fp16_saturates() -> None:
    x = torch.tensor([[1e6, -1e6, 65504.0]])
    assert decode("fp16", encode("fp16", x), (3,)).tolist() == [[65504.0, -65504.0, 65504.0]]


def test_int8_formula() -> None:
    x = tokens(2, 4, 6, 48)
    stored = encode("int8", x)
    x64 = x.numpy().astype(np.float64)
    scale = np.abs(x64).max(-1) / 127
    np.testing.assert_allclose(stored[".scale"].numpy(), scale, rtol=1e-6)
    error = decode("int8", stored, (6, 48)).numpy() - x64
    # Half a step, and float32 rounding of the quotient.
    assert (np.abs(error) <= scale[..., None] * (0.5 + 1e-4)).all()
    assert stored[""].abs().max() == 127


def test_fp8_formula() -> None:
    x = tokens(3, 4, 6, 48)
    stored = encode("fp8", x)
    table = fp8_values()
    scale = np.abs(x.numpy().astype(np.float64)).max(-1, keepdims=True) / 448
    exact = x.numpy() / scale
    finite = np.sort(table[np.isfinite(table)])
    nearest = np.abs(exact[..., None] - finite).min(-1)
    decoded = table[stored[""].numpy()]
    assert (np.abs(decoded - exact) <= nearest + 1e-4 * np.abs(exact)).all()
    np.testing.assert_allclose(decode("fp8", stored, (6, 48)).numpy(), decoded * scale, rtol=1e-6)


def test_int4_formula_and_packing() -> None:
    x = tokens(4, 3, 5, 64)
    stored = encode("int4", x)
    groups = x.numpy().reshape(3, 5, 2, 32)
    scale = (np.abs(groups).max(-1) / np.float32(7)).astype(np.float16)
    assert np.array_equal(stored[".scale"].numpy(), scale)
    q = np.clip(np.rint(groups / scale[..., None].astype(np.float32)), -7, 7).reshape(3, 5, 64)
    packed = (q[..., 0::2] + 8).astype(np.uint8) | ((q[..., 1::2] + 8).astype(np.uint8) << 4)
    assert np.array_equal(stored[""].numpy(), packed)
    expected = (q.reshape(groups.shape) * scale[..., None].astype(np.float32)).reshape(x.shape)
    assert np.array_equal(decode("int4", stored, (5, 64)).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("codec", LOSSY)
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-6, 3))
def test_error_bounds(codec: str, seed: int, exponent: int) -> None:
    x = tokens(seed, 2, 3, 32, scale=10.0**exponent)
    x = x.clamp(-6e4, 6e4)
    error = (decode(codec, encode(codec, x), (3, 32)) - x).double().abs()
    peak = x.double().abs().amax(-1, keepdim=True)
    # Largest error relative to the token's (group's) largest value: half a step of each format, plus the
    # smallest number that the format or its float16 scale can hold.
    step = {"fp16": 2**-11, "bf16": 2**-8, "int8": 0.51 / 127, "fp8": 16.1 / 448, "int4": 0.51 / 7 + 2e-3}[codec]
    floor = {"int4": 7 * 2**-24, "fp16": 2**-24}.get(codec, 1e-37)
    assert (error <= step * peak + floor).all()


@pytest.mark.parametrize("codec", [c for c in CODECS if c != "raw"])
def test_zero_and_extreme_tokens_stay_finite(codec: str) -> None:
    x = torch.zeros(1, 4, 32)
    x[0, 1] = 1e-30
    x[0, 2, 3] = 6e4
    x[0, 3] = -1e-8
    back = decode(codec, encode(codec, x), (4, 32))
    assert torch.isfinite(back).all()
    assert (back[0, 0] == 0).all()
    assert abs(float(back[0, 2, 3]) / 6e4 - 1) < 0.005


def test_decode_compiles_to_the_same_values() -> None:
    x = tokens(5, 2, 4, 64)
    for codec in ("int8", "fp8", "int4", "bf16"):
        stored = encode(codec, x)
        compiled = torch.compile(lambda s, c=codec: decode(c, s, (4, 64)), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(stored), decode(codec, stored, (4, 64)))


def test_raw_keeps_values_and_dtype() -> None:
    x = torch.arange(6, dtype=torch.int64).reshape(3, 2)
    assert decode("raw", encode("raw", x), (2,)) is x
    assert stored_arrays("raw", (2,), "int64") == {"": (np.dtype(np.int64), (2,))}


def test_refusals() -> None:
    with pytest.raises(UserError, match="no codec 'int5'"):
        encode("int5", torch.zeros(1, 2))
    with pytest.raises(UserError, match="groups of 32"):
        encode("int4", torch.zeros(1, 33))
    with pytest.raises(UserError, match="scalar"):
        stored_arrays("int8", ())
    with pytest.raises(UserError, match="dtype"):
        stored_arrays("raw", (), "object")
