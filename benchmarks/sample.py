"""Speed of sampling: the compiled sampler beside the same sampler run eagerly, with and without guidance.

    python benchmarks/sample.py --name cpu                                    # small: SiT-S/2, 4 steps, 2 images
    python benchmarks/sample.py --name h100 --device cuda                     # SiT-XL/2, 250 steps, 64 images

Writes `benchmarks/results/sample-<name>.json`. What is timed is the drawing of latents exactly as `trainer sample` does it
(noise drawn on the host, float64 state, one doubled forward pass for guidance); decoding to 8-bit pixels by the SD-VAE's
architecture, of `decoded` images at a time, is timed by itself. The weights are random and nowhere zero: a GPU runs faster on zeros.

All variants share one process and take turns: in every round each draws one batch, in rotating order, so that what else
the machine does hits all alike. Figures are medians over the rounds; a ratio is the median of the ratios within the
rounds. The first batch of a variant, in which it is compiled, is reported as its warm-up and not counted.

Variants are `<eager|compiled>-<precision>`. `eager-tf32` is how the public samplers of DiT, SiT and REPA run by default.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {  # what a device can do in some minutes
    "cuda": {
        "model": "SiT-XL/2",
        "steps": 250,
        "batch_size": 64,
        "decoded": 64,
        "rounds": 3,
        "precisions": "tf32,bf16",
    },
    "cpu": {"model": "SiT-S/2", "steps": 4, "batch_size": 2, "decoded": 1, "rounds": 5, "precisions": "fp32"},
}


def network(model: str, latent_size: int, precision: str, compiled: bool, device: Any) -> Any:
    """A backbone of ImageNet's shape with seeded weights, ready to sample from."""
    import torch

    from trainer.models import build_model, model_config
    from trainer.sampling.inference import Arithmetic, Network

    cfg = model_config(model, latent_channels=4, latent_size=latent_size, num_classes=1000)
    backbone = build_model(cfg).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return Network(backbone.to(device), Arithmetic(precision=precision, compile=compiled))


def jobs_of(options: dict[str, Any], device: Any) -> dict[str, Callable[[], Any]]:
    """Name -> one batch of it. The backbones of eager variants of one precision and its compiled ones hold own weights."""
    import torch

    from featcache.encoders.base import WeightsSource
    from featcache.encoders.vae import LatentDecoder, load_vae
    from trainer.diffusion.guidance import Guidance
    from trainer.sampling.draw import SAMPLERS, SampleConfig, decode_pixels, draw_latents
    from trainer.sampling.inference import Arithmetic, applied

    count = options["batch_size"]
    labels = torch.arange(count, device=device) % 1000
    family = "dit" if options["model"].startswith("DiT") else "sit"
    sampler = options["sampler"] or SAMPLERS[family][0]
    jobs: dict[str, Callable[[], Any]] = {}

    def drawing(net: Any, scale: float) -> Callable[[], Any]:
        config = SampleConfig(sampler=sampler, steps=options["steps"], guidance=Guidance(scale=scale))

        def draw() -> Any:
            with applied(net.arithmetic):
                return draw_latents(net, labels, range(count), config)

        return draw

    for precision in options["precisions"].split(","):
        for kind in ("eager", "compiled"):
            net = network(options["model"], options["latent_size"], precision, kind == "compiled", device)
            jobs[f"{kind}-{precision}"] = drawing(net, 1.0)
            jobs[f"{kind}-{precision}-guided"] = drawing(net, options["guidance"])
    vae = LatentDecoder(load_vae("sd-ft-ema", WeightsSource(random_seed=0))[0], {}).to(device)
    latents = torch.randn(options["decoded"], 4, options["latent_size"], options["latent_size"]).to(device)

    def decode() -> Any:
        with applied(Arithmetic(precision="fp32" if device.type == "cpu" else "tf32")):
            return decode_pixels(vae, latents).cpu()

    return {**jobs, "decode": decode}


def timed(job: Callable[[], Any], device: Any) -> float:
    """Seconds of one batch, the device idle before and after."""
    import torch

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    settle()
    start = time.perf_counter()
    job()
    settle()
    return time.perf_counter() - start


def measure(options: dict[str, Any], device: Any) -> dict[str, Any]:
    """Warm-up, rounds, medians."""
    import torch

    jobs = jobs_of(options, device)
    warm_up = {name: timed(job, device) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(options["rounds"]):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timed(jobs[name], device))
    results: dict[str, Any] = {}
    for name, values in seconds.items():
        count = options["decoded" if name == "decode" else "batch_size"]
        results[name] = {
            "images_per_s": count / statistics.median(values),
            "images_per_s_of_rounds": [count / value for value in values],
            "warm_up_s": warm_up[name],
        }
    first = options["precisions"].split(",")[0]
    for name in names[:-1]:
        guided = "-guided" if name.endswith("-guided") else ""
        for base in dict.fromkeys((f"eager-{name.split('-')[1]}{guided}", f"eager-{first}{guided}")):
            if base != name:
                pairs = zip(seconds[base], seconds[name])
                results[name][f"times_{base}"] = statistics.median(slow / fast for slow, fast in pairs)
    if device.type == "cuda":
        results["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return results


def main(
    name: Annotated[str, typer.Option(help="Names the result file.")],
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Backbone. [default: SiT-XL/2; SiT-S/2 on the CPU]")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. [default: 250; 4 on the CPU]", min=2)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at once. [default: 64; 2 on the CPU]", min=1)] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Turns of every variant. [default: 3; 5 on the CPU]", min=1)
    ] = None,
    precisions: Annotated[
        str | None, typer.Option(help="fp32, tf32, bf16. [default: tf32,bf16; fp32 on the CPU]")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="As for trainer sample. [default: sde or ddpm]")] = None,
    guidance: Annotated[float, typer.Option(help="Scale of the guided variants, at all times.")] = 1.8,
    latent_size: Annotated[int, typer.Option(help="Side of the latents: 32 is 256 pixels.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = RESULTS,
) -> None:
    """Measure and write JSON."""
    import torch

    from featcache.machine import describe_machine, pick_device
    from trainer.sampling.inference import choose_arithmetic

    torch_device = torch.device(pick_device(device))
    sizes = SIZES["cuda" if torch_device.type == "cuda" else "cpu"]
    asked = {"model": model, "steps": steps, "batch_size": batch_size, "rounds": rounds, "precisions": precisions}
    options: dict[str, Any] = {**sizes, **{key: value for key, value in asked.items() if value is not None}}
    options |= {"sampler": sampler, "guidance": guidance, "latent_size": latent_size}
    for precision in options["precisions"].split(","):
        choose_arithmetic(torch_device, precision)
    machine = describe_machine("torch")
    report = {
        "command": " ".join(["python", "benchmarks/sample.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "options": options,
        "device": machine["gpu" if torch_device.type == "cuda" else "cpu"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "versions": {"python": machine["python"], **machine["packages"], "cuda": torch.version.cuda},
        "results": measure(options, torch_device),
    }
    for variant, result in report["results"].items():
        if isinstance(result, dict):
            ratios = "  ".join(f"{key} {value:.2f}" for key, value in result.items() if key.startswith("times_"))
            print(f"{variant:>24}  {result['images_per_s']:.4g} images/s  {ratios}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"sample-{name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
