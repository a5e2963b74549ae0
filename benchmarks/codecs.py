"""What each codec loses: token cosine and relative error of every feature of a cache that was stored exactly.

    featcache build --data IMAGES --encoder tiny --vae-levels G3,G4 --moments-codec fp32 ... --out
    caches/exact python benchmarks/codecs.py caches/exact

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
from featcache.codecs import CODECS
from featcache.errors import UserError
from featcache.fidelity import fidelity

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--json", type=Path, default=RESULTS / "codecs.json")
    args = parser.parse_args()
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
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "dataset": {"name": dataset.name, "images": min(args.samples, len(cache)), **dataset.preprocessing},
        "provenance": {spec.name: dict(spec.provenance) for spec in features},
        "codecs": found,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nsaved {args.json}")


if __name__ == "__main__":
    main()
