"""Training from features that are stored as principal components."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import Listener, losses, settings
from torch._dynamo.utils import counters

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.progress import Quiet
from trainer.training.loop import train


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images: exact, and with nearly all components of levels and tokens."""
    root = tmp_path_factory.mktemp("caches")
    for name, rank in (("exact", None), ("components", 64)):
        build(
            BuildRequest(
                data="shapes",
                encoders=(EncoderChoice(name="tiny"),),
                levels=("G3", "G4"),
                limit=40,
                batch_size=8,
                shard_size=8,
                levels_codec="fp32",
                tokens_codec="fp32",
                levels_basis=rank,
                tokens_basis=rank,
                out=root / name,
            ),
            Quiet(),
        )
    return {name: root / name for name in ("exact", "components")}


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", ["ahpa", "repa"])
def test_components_train_as_their_features_do(
    caches: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a run on most components follows that on all channels; the step stays one compiled region."""

    def losses_on(cache: str, **changes: bool) -> list[float]:
        config = settings(caches[cache], method, steps=4, **changes)
        return losses(train(config, resume=False, watcher=Listener(), root=tmp_path / f"{cache}{changes}"))

    exact, eager = losses_on("exact"), losses_on("components")
    assert eager == pytest.approx(exact, abs=0.02)
    assert eager != exact
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: real(m, **kw, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    assert losses_on("components", compile=True) == pytest.approx(eager, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1  # every step of these is aligned
    assert not counters["graph_break"]
