"""Losses, gradient norms, random draws and samples to the last bit, as recorded before a change of the code behind them.

`data/same_numbers.json` holds the numbers with the PyTorch version and processor they were computed by: there they must
come out again exactly, elsewhere within 1e-6. Weights, heads and stored bytes are random but seeded, and no weight is
zero, so every path of the step counts. To record anew (only when numbers are meant to change):

    python tests/trainer/test_same_numbers.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import settings
from torch import Tensor

import featcache
from featcache.machine import cpu_name
from featcache.progress import Quiet
from trainer.diffusion.guidance import Guidance
from trainer.diffusion.transport import build_transport
from trainer.distributed import World
from trainer.interval import Interval
from trainer.sampling.draw import SampleConfig, draw_latents
from trainer.training.objective import draw
from trainer.training.state import Parts, assemble

RECORD = Path(__file__).parent / "data" / "same_numbers.json"
CPU = torch.device("cpu")
BATCH, STEPS = 4, 2

CASES: dict[str, dict[str, Any]] = {
    f"{model}-{method}": {"method": method, "model": f"{model}-Nano/2"}
    for model in ("SiT", "DiT")
    for method in ("none", "repa", "sra", "ahpa")
} | {"SiT-cosine-lognormal": {"method": "sra", "model": "SiT-Nano/2", "path": "cosine", "time_sampling": "lognormal"}}

SAMPLERS = {"SiT": ("sde", "ode", "heun"), "DiT": ("ddpm", "ddim")}


def perturb(parts: Parts) -> None:
    """Moves model and average away from their zero initialisation, each its own way."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in (parts.objective, parts.ema):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def stored_bytes(cache: Any, names: list[str]) -> dict[str, Tensor]:
    """A batch laid out as the cache's, with seeded values: it depends on no encoder."""
    generator = torch.Generator().manual_seed(6)
    with cache.reader(names) as reader:
        batch = {name: torch.from_numpy(array) for name, array in reader.allocate(BATCH).items()}
    for tensor in batch.values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        else:
            tensor.copy_(torch.randint(0, 10, tensor.shape, generator=generator))
    return batch


def norm(parameters: list[Any]) -> float:
    return float(torch.stack([p.grad.double().square().sum() for p in parameters if p.grad is not None]).sum().sqrt())


def latents_of(parts: Parts, config: Any, sampler: str) -> list[float]:
    """The first of two samples' values, in units of their root mean square, and that.

    Rounding is measured by all values at once: a DDPM sampler's first step takes the difference of numbers 157 times as
    large as the latent it leads to.
    """
    drawn = draw_latents(
        parts.ema,
        torch.tensor([3, 7]),
        [0, 5],
        SampleConfig(sampler=sampler, steps=4, guidance=Guidance(scale=1.5, interval=Interval(0.2, 0.8)), seed=3),
        transport=build_transport(parts.ema.cfg.family, path=config.path),
    ).double()
    size = drawn.square().mean().sqrt()
    return [*(drawn / size).flatten()[:6].tolist(), size.item()]


def numbers_of(cache: Any, case: str) -> dict[str, Any]:
    """Everything recorded of one case; every one to its last bit."""
    config = settings(cache.path, **CASES[case])
    parts = assemble(config, cache, CPU, World())
    perturb(parts)
    reads = parts.alignment.reads if parts.alignment is not None else ()
    batch = stored_bytes(cache, ["vae/moments", "label", *(name for name in reads if name != "vae/moments")])
    cfg = parts.model.cfg
    steps = []
    for step in range(STEPS):
        draws = draw(
            seed=1,
            step=step,
            batch=BATCH,
            latent_shape=(cfg.latent_channels, cfg.latent_size, cfg.latent_size),
            time_sampling=config.time_sampling,
            device=CPU,
        )
        terms, kept = parts.objective(batch, draws)
        torch.stack(list(terms.values())).sum().backward()
        steps.append(
            {
                "draws": {n: v.flatten()[:3].tolist() for n, v in vars(draws).items() if isinstance(v, torch.Tensor)},
                "terms": {name: value.item() for name, value in terms.items()},
                "t": kept.t.tolist() if kept is not None else [],
                "gradients": [norm(group) for group in parts.groups],
                "metrics": {n: v.item() for n, v in parts.objective.measure(kept, batch, draws).items()}
                if kept
                else {},
            }
        )
        for parameter in parts.objective.parameters():
            parameter.grad = None
    samples = {name: latents_of(parts, config, name) for name in SAMPLERS[config.model[:3]]}
    return {"steps": steps, "samples": samples}


def flat(values: Any, at: str = "") -> dict[str, float]:
    """Numbers of a nest by their path."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {path: number for key, value in items for path, number in flat(value, f"{at}/{key}").items()}
    return {at: values}


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_recorded(shapes_cache: Path, case: str) -> None:
    record = json.loads(RECORD.read_text())
    expected, found = flat(record["cases"][case]), flat(numbers_of(featcache.open(shapes_cache), case))
    found = {
        path: number for path, number in found.items() if path in expected or "/metrics/" not in path
    }  # new readings
    if record["made by"] == made_by():
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_everything_is_recorded() -> None:
    record = json.loads(RECORD.read_text())
    assert record["cases"].keys() == CASES.keys()
    for case, numbers in record["cases"].items():
        assert len(numbers["steps"]) == STEPS and numbers["samples"].keys() == set(SAMPLERS[case[:3]])
        for step in numbers["steps"]:
            assert (len(step["terms"]) > 1) == (CASES[case]["method"] != "none")
            assert all(norm > 1e-3 for norm in step["gradients"])


def made_by() -> dict[str, str]:
    """What the last bits depend on, beside the code."""
    return {"torch": torch.__version__, "cpu": cpu_name(), "vectors": torch.backends.cpu.get_cpu_capability()}


def record_all() -> None:
    """Writes the record anew."""
    import tempfile

    from tiny_runs import add_nano

    from featcache.builder.request import BuildRequest
    from featcache.builder.run import build
    from featcache.encoders import EncoderChoice

    torch.set_num_threads(1)
    add_nano()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shapes"
        encoders = (EncoderChoice(name="tiny"),)
        build(BuildRequest(data="shapes", encoders=encoders, limit=24, batch_size=8, shard_size=8, out=path), Quiet())
        cases = {case: numbers_of(featcache.open(path), case) for case in CASES}
    record = {"made by": made_by(), "cases": cases}
    RECORD.parent.mkdir(exist_ok=True)
    text = json.dumps(record, separators=(",", ":"))
    RECORD.write_text(text.replace('"SiT-', '\n"SiT-').replace('"DiT-', '\n"DiT-') + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    record_all()
