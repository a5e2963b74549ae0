"""Energy of the singular values of token representations (SARA, Fig. 2b)."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.analyze.result import Result
from trainer.analyze.spectra import Spectrum, effective_rank, energy
from trainer.analyze.subject import Subject
from trainer.plots import Chart, Plot, Series


def run(subject: Subject) -> Result:
    """Spectra of all blocks at all times, and of the cached token features and VAE groups."""
    options, depths = subject.options, range(1, subject.depth + 1)
    values: dict[str, np.ndarray] = {}
    where: dict[str, tuple[int | str, float | str]] = {}
    ranks: dict[str, float] = {}

    def keep(name: str, spectrum: Spectrum, block: int | str = "", t: float | str = "") -> None:
        singular = spectrum.singular_values()
        values[name], ranks[name], where[name] = energy(singular).cpu().numpy(), effective_rank(singular), (block, t)

    for t in options.times:
        spectra = {depth: Spectrum(centred=options.spectrum_centred) for depth in depths}
        for rows in subject.chunks():
            for depth, h in subject.hidden(rows, t, depths).items():
                spectra[depth].add(h.flatten(0, 1))
        for depth in depths:
            keep(f"block{depth}:{t:g}", spectra[depth], depth, t)
    features = subject.shown_targets()
    for name in features:
        spectrum = Spectrum(centred=options.spectrum_centred)
        for rows in subject.chunks():
            feature = subject.read(name, rows)
            spectrum.add((feature[:, -1] if name.startswith("vae/") else feature).flatten(0, 1))
        keep(name, spectrum)
    # Out of a few directions any few hold everything: at most a quarter of them are counted.
    top = min(options.spectrum_top, max(1, subject.cfg.width // 4))
    shares = np.array([[values[f"block{d}:{t:g}"][top - 1] for d in depths] for t in options.times])
    middle = options.times[len(options.times) // 2]
    shown = [
        (f"block {subject.block}, t = {t:g}", f"block{subject.block}:{t:g}")
        for t in options.times[:: max(1, len(options.times) // 2)]
    ]
    curves = [
        # Beyond the counted ones all lines run along 100 %; ending there, their last values are the shares compared.
        Series(
            label=label,
            x=np.arange(1, len(values[key]) + 1)[:top],
            y=100 * values[key][:top],
            colour=i,
            dashed=i >= len(shown),
        )
        for i, (label, key) in enumerate([*shown, *((f, f) for f in features)])
    ]
    blocks = np.array(list(depths))
    lines = [
        Series(label=f"t = {t:g}", x=blocks, y=100 * shares[i], colour=i % 7, markers=True)
        for i, t in enumerate(options.times)
    ]
    mine = float(values[f"block{subject.block}:{middle:g}"][top - 1])
    compared = "; ".join(f"{f} {100 * values[f][min(top, len(values[f])) - 1]:.1f} %" for f in features)
    return Result(
        what="spectrum",
        title="Singular-value spectrum",
        question="Do the hidden states use many directions, or have they collapsed into a few?",
        finding=f"The top {top} singular values of block {subject.block} at t = {middle:g} hold {100 * mine:.1f} % "
        "of the energy"
        f"{' (' + compared + ')' if compared else ''}; its effective rank is "
        f"{ranks[f'block{subject.block}:{middle:g}']:.0f} "
        f"of {subject.cfg.width}.",
        plots=[
            Plot(
                name="spectrum_energy",
                headline=curves[len(shown) // 2],
                headline_title="the aligned block",
                drawing=Chart(
                    title=f"Energy in the first {top} singular values",
                    x_label="number of singular values",
                    y_label="share of energy (%)",
                    series=curves,
                    note="Look for a line that climbs steeply and early: few directions carry everything, the "
                    "redundancy that SARA Fig. 2b finds in REPA (82.6 % in the top 50) and not in the encoder.",
                ),
            ),
            Plot(
                name="spectrum_blocks",
                drawing=Chart(
                    title=f"Top {top} singular values, by block",
                    x_label="block",
                    y_label=f"energy in the top {top} (%)",
                    series=lines,
                    note="Look for blocks where the share jumps up: representations collapse there (SARA Fig. 2b "
                    "compares this number between DINOv2, REPA and SARA).",
                ),
            ),
        ],
        rows=[_row(name, *where[name], v, ranks[name], top) for name, v in values.items()],
        settings={
            "energy": "squared singular values; SARA does not define it",
            "centred": "yes" if options.spectrum_centred else "no",
            "top": top
            if top == options.spectrum_top
            else f"{top} (a quarter of the width; {options.spectrum_top} was asked for)",
            "rows": f"all tokens of {len(subject.indices)} samples",
            "weights": subject.weights,
        },
    )


def _row(name: str, block: int | str, t: float | str, share: np.ndarray, rank: float, top: int) -> dict[str, Any]:
    return {
        "representation": name,
        "block": block,
        "t": t,
        "width": len(share),
        "top": min(top, len(share)),
        "top_energy_percent": 100 * float(share[min(top, len(share)) - 1]),
        "values_for_90_percent": int(np.searchsorted(share, 0.9) + 1),
        "effective_rank": rank,
    }
