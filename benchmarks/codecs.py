"""What each codec loses: token cosine and relative error of every feature of a cache that was stored exactly.

    featcache build --data IMAGES --encoder tiny --vae-levels G3,G4 --moments-codec fp32 ... --out caches/exact
    python benchmarks/codecs.py caches/exact
    python benchmarks/codecs.py --outliers       # no cache: Gaussian tokens with one channel far above the others

The cache must hold its features in fp32. A token is one vector over the last axis; for moments `[2C, h, w]`,
where that axis is a row of the latent, the figures are by row. Cosine is the mean and the worst over tokens;
relative error is the root of the summed squared error over the summed squares.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import machine

import featcache
from featcache.builder.fidelity import fidelity
from featcache.errors import UserError
from featcache.store.layout import CODECS

RESULTS = Path(__file__).parent / "results"
TOKENS = 4096
RATIOS = (None, 8.0, 12.0, 16.0, 24.0)  # None: no outlier, the Gaussian's own largest value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", nargs="?")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--json", type=Path, help="[default: results/codecs.json, with --outliers codecs-outliers.json]"
    )
    args = parser.parse_args()
    if args.outliers:
        save(args.json or RESULTS / "codecs-outliers.json", {"tokens": TOKENS, "channels": 768, "codecs": outliers()})
        return
    if args.cache is None:
        parser.error("name a cache, or type --outliers")
    cache = featcache.open(args.cache)
    features = [s for s in cache.manifest.features.values() if s.codec == "fp32"]
    if not features:
        raise SystemExit(f"{args.cache} holds no feature in fp32")
    found: dict[str, dict[str, Any]] = {}
    for spec in features:
        with cache.reader([spec.name]) as reader:
            n = min(args.samples, len(cache))
            out = reader.allocate(n)
            reader.read(np.arange(n), out)
        x = torch.from_numpy(out[spec.name])
        x = x.flatten(0, 1) if spec.views > 1 else x
        print(f"\n{spec.name} {list(spec.shape)}, {n} images")
        print(f"{'codec':6}{'bytes/image':>14}{'mean cosine':>14}{'worst cosine':>14}{'rel. error':>12}")
        for codec in CODECS:
            if codec == "raw":
                continue
            try:
                row = fidelity(codec, x)
            except UserError as error:
                print(f"{codec:6}  {error.what}")
                continue
            found.setdefault(spec.name, {})[codec] = row
            print(
                f"{codec:6}{row['bytes_per_image']:>14,}{row['mean_cosine']:>14.6f}"
                f"{row['worst_cosine']:>14.6f}{row['relative_error']:>12.2e}"
            )
    dataset = cache.manifest.dataset
    about = {
        "dataset": {"name": dataset.name, "images": min(args.samples, len(cache)), **dataset.preprocessing},
        "provenance": {spec.name: dict(spec.provenance) for spec in features},
        "codecs": found,
    }
    save(args.json or RESULTS / "codecs.json", about)


def outliers(channels: int = 768) -> dict[str, dict[str, dict[str, float]]]:
    """By largest value over root mean square, and codec: fidelity of tokens with one large channel.

    With v in one channel and unit normal values in the other n - 1, the ratio is r for v^2 = r^2 (n - 1) / (n - r^2).
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'max/rms':>8}{'codec':>7}{'mean cosine':>14}{'rel. error':>12}")
    for ratio in RATIOS:
        x = torch.randn(1, TOKENS, channels, generator=torch.Generator().manual_seed(0))
        if ratio is not None:
            x[..., 0] = ratio * ((channels - 1) / (channels - ratio**2)) ** 0.5
        label = f"{float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()):.3g}"
        for codec in ("int8", "fp8", "int4"):
            row = found.setdefault(label, {})[codec] = fidelity(codec, x)
            print(f"{label:>8}{codec:>7}{row['mean_cosine']:>14.6f}{row['relative_error']:>12.2e}")
    return found


def save(path: Path, figures: dict[str, Any]) -> None:
    """Figures with the command, the date and the machine."""
    head = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **figures}, indent=1) + "\n")
    print(f"\nsaved {path}")


if __name__ == "__main__":
    main()
