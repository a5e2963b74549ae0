"""What must be the same on a GPU as on the CPU. Run on the CPU too, so that the tests themselves are known to work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import settings

import featcache
from featcache.codecs import CODECS, decode, encode
from featcache.precision import tensor_float32
from featcache.torch import Loader
from trainer.distributed import World
from trainer.training.objective import draw
from trainer.training.state import assemble

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "raw"])
def test_a_codec_gives_the_same_bits(codec: str, device: str) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)
    expected, found = encode(codec, x), encode(codec, x.to(device))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[suffix].cpu()) for suffix, value in expected.items())
    for dtype in (torch.float32, torch.bfloat16):
        on_device = {suffix: value.to(device) for suffix, value in expected.items()}
        assert torch.equal(decode(codec, expected, (5, 64), dtype), decode(codec, on_device, (5, 64), dtype).cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_the_loader_delivers_what_is_stored(shapes_cache: Path, device: str) -> None:
    """Over more batches than it has buffers, each kept as a copy queued behind the delivery."""
    names = ["vae/moments", "vae/G3", "label"]
    taken = {}
    for place in ("cpu", device):
        loader = Loader(shapes_cache, names, batch_size=4, dtype=None, device=torch.device(place), stop=12)
        taken[place] = [{name: value.clone() for name, value in batch.items()} for batch in loader]
    assert len(taken[device]) == 12
    for expected, found in zip(taken["cpu"], taken[device], strict=True):
        assert all(torch.equal(value, found[name].cpu()) for name, value in expected.items())


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["none", "repa", "sara", "dya", "ahpa", "sra", "sra2"])
def test_a_step_s_losses_and_gradients_are_those_of_the_cpu(shapes_cache: Path, method: str, device: str) -> None:
    """Float32 without TF32, the same batch and draws."""
    cache = featcache.open(shapes_cache)
    config = settings(shapes_cache, method, precision="fp32", compile=False)
    draws = draw(seed=0, step=0, batch=4, latent_shape=(16, 8, 8), time_sampling="uniform", device=CPU)
    found: dict[str, Any] = {}
    for place in ("cpu", device):
        parts = assemble(config, cache, torch.device(place), World())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # away from zero, where gradients vanish
            for parameter in parts.objective.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(place))
        with cache.reader(list(parts.reads)) as reader:
            out = reader.allocate(4)
            reader.read(np.arange(4), out)
        batch = {name: torch.from_numpy(value).to(place) for name, value in out.items()}
        own = replace(
            draws, **{n: getattr(draws, n).to(place) for n in ("time", "posterior", "noise", "drop", "align")}
        )
        with tensor_float32(False):
            terms, _ = parts.objective(batch, own)
            torch.stack(list(terms.values())).sum().backward()
        norms = torch.stack([p.grad.norm() for p in parts.names if p.grad is not None])
        found[place] = {name: float(value.detach()) for name, value in terms.items()}, norms.cpu()
    assert found[device][0] == pytest.approx(found["cpu"][0], rel=1e-4, abs=1e-6)
    assert torch.allclose(found[device][1], found["cpu"][1], rtol=1e-3, atol=1e-6)
