"""Energy of the singular values of token representations (SARA, Fig. 2b)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.analyze.result import Result, Row
from trainer.analyze.spectra import Spectrum, effective_rank, energy
from trainer.analyze.subject import Subject
from trainer.plots import Chart, Plot, Series


@dataclass(frozen=True, kw_only=True)
class _Spectra:
    """By representation, a block at a time (`block3:0.5`) or a cached feature.

    shares: of the energy that the first n singular values hold, [width]. ranks: effective ones. places: block and time,
    empty for features.
    """

    shares: dict[str, np.ndarray]
    ranks: dict[str, float]
    places: dict[str, tuple[int | str, float | str]]
    features: list[str]

    def top(self, name: str, count: int) -> float:
        """Share of the energy in the first `count` singular values, or in all if there are fewer."""
        share = self.shares[name]
        return float(share[min(count, len(share)) - 1])


def run(subject: Subject) -> Result:
    """Spectra of all blocks at all times, and of the cached token features and VAE groups."""
    options = subject.options
    found = measure(subject)
    # Out of a few directions any few hold everything: at most a quarter of them are counted.
    top = min(options.spectrum_top, max(1, subject.cfg.width // 4))
    return Result(
        what="spectrum",
        title="Singular-value spectrum",
        question="Do the hidden states use many directions, or have they collapsed into a few?",
        finding=_finding(subject, found, top),
        plots=[_energy_plot(subject, found, top), _blocks_plot(subject, found, top)],
        rows=[_row(found, name, top) for name in found.shares],
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


def measure(subject: Subject) -> _Spectra:
    """Spectra over all tokens of all samples."""
    options, depths = subject.options, range(1, subject.depth + 1)
    found = _Spectra(shares={}, ranks={}, places={}, features=list(subject.shown_targets()))

    def keep(name: str, spectrum: Spectrum, block: int | str = "", t: float | str = "") -> None:
        singular = spectrum.singular_values()
        found.shares[name], found.ranks[name] = energy(singular).cpu().numpy(), effective_rank(singular)
        found.places[name] = block, t

    for t in options.times:
        spectra = {depth: Spectrum(centred=options.spectrum_centred) for depth in depths}
        for rows in subject.chunks():
            for depth, h in subject.hidden(rows, t, depths).items():
                spectra[depth].add(h.flatten(0, 1))
        for depth in depths:
            keep(_state(depth, t), spectra[depth], depth, t)
    for name in found.features:
        spectrum = Spectrum(centred=options.spectrum_centred)
        for rows in subject.chunks():
            feature = subject.read(name, rows)
            spectrum.add((feature[:, -1] if name.startswith("vae/") else feature).flatten(0, 1))
        keep(name, spectrum)
    return found


def _state(block: int, t: float) -> str:
    return f"block{block}:{t:g}"


def _finding(subject: Subject, found: _Spectra, top: int) -> str:
    middle = subject.options.times[len(subject.options.times) // 2]
    tapped = _state(subject.block, middle)
    compared = "; ".join(f"{f} {100 * found.top(f, top):.1f} % of {len(found.shares[f])}" for f in found.features)
    return (
        f"The top {top} singular values of block {subject.block} at t = {middle:g} hold "
        f"{100 * found.top(tapped, top):.1f} % of the energy of {subject.cfg.width} dimensions"
        f"{' (' + compared + ')' if compared else ''}; its effective "
        f"rank is {found.ranks[tapped]:.0f} of {subject.cfg.width}."
    )


def _energy_plot(subject: Subject, found: _Spectra, top: int) -> Plot:
    """Energy over the number of singular values: the aligned block at three times, and the cached features."""
    times = subject.options.times
    shown = [(f"block {subject.block}, t = {t:g}", _state(subject.block, t)) for t in times[:: max(1, len(times) // 2)]]
    curves = [
        # Beyond the counted ones all lines run along 100 %; ending there, their last values are the shares compared.
        Series(
            label=label,
            x=np.arange(1, len(found.shares[name]) + 1)[:top],
            y=100 * found.shares[name][:top],
            colour=i,
            dashed=i >= len(shown),
        )
        for i, (label, name) in enumerate([*shown, *((f, f) for f in found.features)])
    ]
    return Plot(
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
    )


def _blocks_plot(subject: Subject, found: _Spectra, top: int) -> Plot:
    """Energy in the top singular values over blocks, one line per time."""
    blocks = np.arange(1, subject.depth + 1)
    lines = [
        Series(
            label=f"t = {t:g}",
            x=blocks,
            y=100 * np.array([found.shares[_state(d, t)][top - 1] for d in range(1, subject.depth + 1)]),
            colour=i % 7,
            markers=True,
        )
        for i, t in enumerate(subject.options.times)
    ]
    return Plot(
        name="spectrum_blocks",
        drawing=Chart(
            title=f"Top {top} singular values, by block",
            x_label="block",
            y_label=f"energy in the top {top} (%)",
            series=lines,
            note="Look for blocks where the share jumps up: representations collapse there (SARA Fig. 2b "
            "compares this number between DINOv2, REPA and SARA).",
        ),
    )


def _row(found: _Spectra, name: str, top: int) -> Row:
    share, (block, t) = found.shares[name], found.places[name]
    return {
        "representation": name,
        "block": block,
        "t": t,
        "width": len(share),
        "top": min(top, len(share)),
        "top_energy_percent": 100 * found.top(name, top),
        "values_for_90_percent": int(np.searchsorted(share, 0.9) + 1),
        "effective_rank": found.ranks[name],
    }
