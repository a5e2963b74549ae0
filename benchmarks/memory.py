"""What a backbone holds between forward and backward pass, with and without recomputation: counted, on any machine.

    python benchmarks/memory.py                                       # writes benchmarks/results/memory.json
    python benchmarks/memory.py --models SiT-XL/2 --batch-size 32

Nothing is computed: tensors are fake ones, which have shapes and storages but no numbers. Counted is what autograd saves
in the forward pass (bf16 autocast, as on a GPU), each storage once, without the weights themselves. `per image` grows
with the batch; `fixed` does not (the weights that autocast has cast). With recomputation one block's share comes on top
while its backward pass runs. Weights in float32, their average, gradients and AdamW's moments (20 bytes a parameter) are
the same either way; FSDP2 (`shard`) divides them by the number of ranks.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = "SiT-B/2,SiT-L/2,SiT-XL/2,LightningDiT-XL/1,MMDiT-L/2"


def config_of(name: str) -> Any:
    """Shape of a backbone at 256 px: on SD-VAE's latents, LightningDiT's /1 on VA-VAE's, MMDiT with CLIP ViT-L/14's text."""
    from trainer.models import TextShape, model_config
    from trainer.models.config import takes_text

    channels, size = (32, 16) if name.endswith("/1") else (4, 32)
    text = TextShape(name="text/clip-l", tokens=77, width=768) if takes_text(name) else None
    return model_config(name, latent_channels=channels, latent_size=size, num_classes=1000, text=text)


def saved_bytes(name: str, batch: int, *, recompute: bool) -> int:
    """Bytes that one forward pass at 256 px leaves for the backward pass."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from trainer.models import empty_model

    cfg = config_of(name)
    backbone = type(empty_model(cfg))
    held: dict[int, Any] = {}
    with FakeTensorMode():
        model = backbone(cfg)
        model.set_recompute(recompute)
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                held[storage._cdata] = storage
            return tensor

        text = None if cfg.text is None else torch.randn(batch, cfg.text.tokens, cfg.text.width)
        condition = torch.zeros(batch, dtype=torch.int64) if text is None else text
        arguments = torch.randn(batch, *cfg.latent_shape), torch.rand(batch), condition
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(*arguments)  # kept until all is counted, so that no storage is another one's successor
        assert output.prediction is not None and output.prediction.requires_grad
        return sum(storage.nbytes() for storage in held.values())


def measure(name: str, batch: int) -> dict[str, Any]:
    """Bytes of one model: parameters, and for each mode what is fixed, what an image adds and what a batch makes."""
    from trainer.models import empty_model

    cfg = config_of(name)
    parameters = sum(p.numel() for p in empty_model(cfg).parameters())
    found: dict[str, Any] = {"parameters": parameters, "blocks": cfg.depth}
    for mode in ("none", "blocks"):
        one, two = (saved_bytes(name, n, recompute=mode == "blocks") for n in (1, 2))
        found[mode] = {"fixed": 2 * one - two, "per_image": two - one, "batch": 2 * one - two + batch * (two - one)}
    block = (found["none"]["per_image"] - found["blocks"]["per_image"]) / cfg.depth
    found["recomputed_block_per_image"] = round(block)
    return found


def main(
    models: Annotated[str, typer.Option(help="Comma-separated backbones.")] = MODELS,
    batch_size: Annotated[int, typer.Option(help="Images on one GPU.")] = 32,
    name: Annotated[str, typer.Option(help="Names the result file.")] = "memory",
) -> None:
    """Count, print a table, write JSON."""
    import torch

    results = {model: measure(model, batch_size) for model in models.split(",")}
    print(
        f"{'model':20} {'parameters':>11} {'recompute':>9} {'fixed MiB':>10} {'MiB/image':>10} {f'GiB at {batch_size}':>10}"
    )
    for model, found in results.items():
        for mode in ("none", "blocks"):
            at = found[mode]
            print(
                f"{model:20} {found['parameters'] / 1e6:10.1f}M {mode:>9} {at['fixed'] / 2**20:10.1f} "
                f"{at['per_image'] / 2**20:10.1f} {at['batch'] / 2**30:10.2f}"
            )
    report = {
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "batch_size": batch_size,
        "results": results,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
