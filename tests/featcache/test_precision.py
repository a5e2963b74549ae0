"""TensorFloat-32 is on or off inside, and as it was outside, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from featcache.encoders.base import Compute
from featcache.precision import tensor_float32


def settings() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def set_to(values: tuple[bool, bool]) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = values


@pytest.fixture
def restored() -> Iterator[None]:
    before = settings()
    yield
    set_to(before)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_tensor_float32_is_put_back(before: tuple[bool, bool]) -> None:
    set_to(before)
    for allowed in (True, False):
        with pytest.raises(KeyError), tensor_float32(allowed):
            assert settings() == (allowed, allowed)
            raise KeyError
        assert settings() == before
    for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", False)):
        with Compute(precision=precision).scope():
            assert settings() == (allowed, allowed)
        assert settings() == before
