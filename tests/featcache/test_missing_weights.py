"""All missing weights of a command are named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.build.prepare import prepare
from featcache.build.request import BuildRequest
from featcache.encoders import EncoderChoice, hub
from featcache.encoders.base import WeightsSource
from featcache.encoders.missing import require_weights
from featcache.errors import WeightsUnavailable


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_hub_problem", lambda: "offline mode is set in the environment")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_every_missing_file_is_named() -> None:
    with pytest.raises(WeightsUnavailable) as caught:
        require_weights(WeightsSource(), vae_name="sd-ft-ema", encoders=["dinov2-b", "mocov3-b"], texts=["clip-l"])
    for part in ("'sd-ft-ema'", "'dinov2-b'", "'mocov3-b'", "weights: offline", "vocabulary (vocab.json)"):
        assert part in caught.value.what
    assert "6 files of pretrained weights are missing" in caught.value.what
    assert "--weights-dir" in (caught.value.remedy or "")


def test_what_is_brought_or_embedded_or_random_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "sd-ft-ema.safetensors").write_bytes(b"x")
    require_weights(WeightsSource(weights_dir=tmp_path), vae_name="sd-ft-ema", encoders=["tiny"], texts=["tiny"])
    require_weights(WeightsSource(random_seed=0), vae_name="sd-ft-ema", encoders=["dinov2-b"], texts=["clip-l"])
    with pytest.raises(WeightsUnavailable, match="weights of 'dinov2-b'"):
        require_weights(WeightsSource(weights_dir=tmp_path), vae_name="sd-ft-ema", encoders=["dinov2-b"])


def test_a_build_names_them_all(tmp_path: Path) -> None:
    choices = (EncoderChoice(name="dinov2-b"), EncoderChoice(name="mocov3-b"))
    request = BuildRequest(data="shapes", limit=8, encoders=choices, weights_dir=tmp_path)
    with pytest.raises(WeightsUnavailable) as caught:
        prepare(request, device="cpu")
    assert all(name in caught.value.what for name in ("'sd-ft-ema'", "'dinov2-b'", "'mocov3-b'"))
    assert "--weights-dir" in (caught.value.remedy or "") and "--random-weights 0" in (caught.value.remedy or "")
