"""Spectra, self-similarity, linear probes, codec gradients and options, against closed forms and plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from featcache.errors import UserError
from featcache.store.manifest import FeatureSpec
from trainer.analyze import DIAGNOSTICS
from trainer.analyze.codec import NAMES, gradient_cosines, roundtrip, stored_bits
from trainer.analyze.config import AnalyzeConfig, parse_what
from trainer.analyze.pca import explained
from trainer.analyze.pictures import SIDE, heat, mark
from trainer.analyze.probe import folds_of, linear_probe, probe_accuracy
from trainer.analyze.selfsim import salient_patch
from trainer.analyze.spectra import Spectrum, effective_rank, energy, self_similarity
from trainer.analyze.subject import choose, initial_share
from trainer.runs.config import RunConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("centred", [True, False])
def test_spectrum_is_that_of_the_whole_matrix(centred: bool) -> None:
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 8.0)) + 1
    spectrum = Spectrum(centred=centred)
    for rows in x.split(13):
        spectrum.add(rows)
    whole = x.double() - x.double().mean(dim=0) if centred else x.double()
    torch.testing.assert_close(spectrum.singular_values(), torch.linalg.svdvals(whole), rtol=1e-8, atol=1e-8)


def test_energy_and_effective_rank() -> None:
    torch.testing.assert_close(energy(torch.tensor([2.0, 1.0, 1.0])), torch.tensor([4 / 6, 5 / 6, 1.0]))
    assert effective_rank(torch.ones(9)) == pytest.approx(9)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    with pytest.raises(UserError, match="constant"):
        energy(torch.zeros(3))


def test_self_similarity_is_a_cosine() -> None:
    tokens = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1))
    found = self_similarity(tokens, 4)
    for b in range(2):
        for n in range(9):
            p, q = tokens[b, 4].double(), tokens[b, n].double()
            assert float(found[b, n]) == pytest.approx(float(p @ q / (p.norm() * q.norm())), abs=1e-6)
    with pytest.raises(UserError, match="no patch 9"):
        self_similarity(tokens, 9)


def test_salient_patch_stands_out() -> None:
    tokens = torch.zeros(16, 3)
    tokens[11] = 1
    assert salient_patch(tokens) == 11


def test_explained_variance() -> None:
    x = np.diag([4.0, 3.0, 2.0, 1.0])
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    assert explained(x) == pytest.approx(values[:3].sum() / values.sum())


def blobs(n: int, classes: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, 12, generator=generator)
    return centres[labels] + spread * torch.randn(n, 12, generator=generator), labels


def test_probe_reads_what_is_linear_and_nothing_from_noise() -> None:
    x, labels = blobs(240, 4, 0.1)
    noise = torch.randn(240, 12, generator=torch.Generator().manual_seed(5))
    (clear, blind), tested = probe_accuracy(
        torch.stack([x, noise]), labels, classes=4, folds=4, epochs=60, batch=None, seed=0
    )
    assert tested == 240
    assert clear == 1.0
    assert abs(blind - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 240)


def test_probes_trained_together_do_not_touch_each_other() -> None:
    x, labels = blobs(60, 3, 1.5)
    other = torch.randn(60, 12, generator=torch.Generator().manual_seed(2))
    both = {"classes": 3, "folds": 3, "epochs": 5, "batch": 10, "seed": 1}
    together, _ = probe_accuracy(torch.stack([x, other]), labels, **both)
    alone = [probe_accuracy(z[None], labels, **both)[0][0] for z in (x, other)]
    assert together == alone


def test_probe_is_adam_on_a_normalised_linear_layer() -> None:
    """Against torch's own layers, one probe at a time."""
    x, labels = blobs(30, 3, 1.0)
    test = x[:7] + 0.3
    norm = torch.nn.BatchNorm1d(12, affine=False, momentum=None)
    norm(x)
    norm.eval()
    norm.running_var = x.var(dim=0, correction=0)  # the layer tracks the unbiased variance but trains with the biased
    linear = torch.nn.Linear(12, 3)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for _ in range(8):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(norm(x)), labels).backward()
        optimizer.step()
        schedule.step()
    found = linear_probe(x[None], labels[None], test[None], classes=3, epochs=8, batch=30)
    assert found[0].tolist() == linear(norm(test)).argmax(dim=1).tolist()


@pytest.mark.parametrize(("folds", "held"), [(1, 6), (3, 23), (23, 23)])
def test_folds_hold_out_each_sample_once(folds: int, held: int) -> None:
    parts = folds_of(23, folds, seed=0)
    out = np.concatenate([rows for _, rows in parts])
    assert len(parts) == folds
    assert len(out) == len(set(out)) == held
    assert all(set(train) | set(rows) == set(range(23)) and not set(train) & set(rows) for train, rows in parts)


def test_more_folds_than_samples() -> None:
    with pytest.raises(UserError, match="cannot make"):
        folds_of(3, 4, seed=0)


def test_gradient_cosines() -> None:
    a = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 4.0]]])
    b = torch.tensor([[[2.0, 0.0]], [[0.0, -1.0]], [[4.0, 3.0]]])
    torch.testing.assert_close(gradient_cosines(a, b), torch.tensor([1.0, -1.0, 24 / 25], dtype=torch.float64))


def test_codecs_in_bits_and_error() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    bits = {codec: stored_bits(codec, (5, 64)) for codec in NAMES}
    assert bits == {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8 + 32 / 64, "fp8": 8 + 32 / 64, "int4": 4 + 16 / 32}

    def back(codec: str) -> torch.Tensor:
        return roundtrip(FeatureSpec(name="x", shape=(5, 64), codec=codec), x)

    assert torch.equal(back("fp32"), x)
    assert torch.equal(back("fp16"), x.half().float())
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    assert ((back("int8") - x).abs() <= step / 2 * 1.0001).all()


def test_pictures() -> None:
    shown = heat(np.array([[-1.0, 0.0], [1.0, 2.0]]))
    assert shown.shape == (SIDE, SIDE, 3)
    assert (shown[0, 0] == shown[0, -1]).all() and (shown[-1, 0] == shown[-1, -1]).all()  # clipped to the ends
    assert (shown[0, 0] != shown[-1, 0]).any()
    plain = np.full((SIDE, SIDE, 3), 128, np.uint8)
    marked = mark(plain, 3, 2)
    assert (plain == 128).all()
    assert (marked[: SIDE // 2] == 128).all() and (marked[:, : SIDE // 2] == 128).all()  # only its own quarter
    assert (marked[-1, SIDE // 2 :] == 255).all() and (marked[-2, SIDE // 2 + 2 : -2] == 0).all()


def test_chosen_samples_are_fixed_by_the_seed() -> None:
    one = choose(100, 30, seed=3)
    assert len(set(one.tolist())) == 30 and one.max() < 100
    assert (one == choose(100, 30, seed=3)).all()
    assert (one[:10] == choose(100, 10, seed=3)).all()
    assert (one != choose(100, 30, seed=4)).any()
    assert sorted(choose(5, 30, seed=0)) == [0, 1, 2, 3, 4]


def test_share_of_the_initialisation() -> None:
    assert initial_share(RunConfig(ema_decay=0.9999), 150) == pytest.approx(0.9999**150)
    assert initial_share(RunConfig(ema_decay=0.9), 0) == 1
    assert initial_share(RunConfig(ema_decay=0.9999, ema_warmup=True), 150) < 1e-5


def test_what() -> None:
    known = tuple(DIAGNOSTICS)
    assert parse_what("all", known) == known
    assert parse_what("router, gsnr", known) == ("gsnr", "router")
    with pytest.raises(UserError, match="no diagnostic 'gsrn'") as error:
        parse_what("gsrn", known)
    assert "gsnr" in str(error.value.remedy)
    with pytest.raises(UserError, match="empty"):
        parse_what(" ", known)


@pytest.mark.parametrize(
    "values",
    [{"bins": 0}, {"times": ()}, {"times": (0.0,)}, {"times": (0.5, 1.2)}, {"samples": 3}, {"patch": -1}, {"k": 0}],
)
def test_bad_options(values: dict[str, object]) -> None:
    with pytest.raises(UserError) as error:
        AnalyzeConfig(**values)  # type: ignore[arg-type]
    assert next(iter(values)) in error.value.what and error.value.remedy
