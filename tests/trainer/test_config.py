"""Settings: strict about keys, forgiving about how numbers are written, clear about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.settings import from_mapping, to_mapping
from trainer.align.ahpa import AhpaConfig
from trainer.align.sra import SraConfig
from trainer.runs.config import RunConfig, apply_overrides
from trainer.runs.recipes import load_recipe


def parse(values: dict[str, Any] | None = None, *overrides: str) -> RunConfig:
    return from_mapping(RunConfig, apply_overrides(values or {}, overrides))


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"stpes": 10}, "steps"),
        ({"learning_rate": 1e-4}, "Valid keys"),
        ({"method": "ahpa", "align": {"ahpa": {"routr": "table"}}}, "align.ahpa.router"),
        ({"batchsize": 8}, "batch_size"),
    ],
)
def test_unknown_keys_are_errors_with_a_suggestion(values: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match="unknown key") as error:
        parse(values)
    assert error.value.remedy is not None and hint in error.value.remedy


@given(key=st.text(min_size=1).filter(lambda k: k not in RunConfig.__dataclass_fields__))
def test_no_unknown_key_passes(key: str) -> None:
    with pytest.raises(UserError):
        from_mapping(RunConfig, {key: 1})


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.e-4", 1e-4), ("2E-5", 2e-5), ("0.0001", 1e-4), (".5e-3", 5e-4), ("1", 1.0)]
)
def test_numbers_may_be_written_as_people_write_them(text: str, value: float, tmp_path: Path) -> None:
    assert parse(None, f"lr={text}").lr == value
    (tmp_path / "r.yaml").write_text(f"lr: {text}\n")
    assert parse(load_recipe(tmp_path / "r.yaml")).lr == value
    assert parse({"method": "ahpa"}, f"ahpa.weight={text}").align["ahpa"] == {"weight": value}


def test_whole_numbers_may_have_exponents_but_no_fraction() -> None:
    assert parse(None, "steps=4e5").steps == 400_000
    with pytest.raises(UserError, match="steps"):
        parse(None, "steps=1.5")


@pytest.mark.parametrize("value", [True, "many", None, [1], {"a": 1}])
def test_wrong_types_are_errors(value: Any) -> None:
    with pytest.raises(UserError, match="steps"):
        parse({"steps": value})


def test_set_reaches_nested_options_and_keeps_the_others() -> None:
    values: dict[str, Any] = {"method": "ahpa+sra", "align": {"ahpa": {"router": "table", "bins": 5}}}
    config = parse(values, "ahpa.bins=7", "align.sra.weight=0.5", "steps=3")
    assert config.align == {"ahpa": {"router": "table", "bins": 7}, "sra": {"weight": 0.5}}
    assert config.steps == 3
    ahpa, sra = config.method_config("ahpa"), config.method_config("sra")
    assert isinstance(ahpa, AhpaConfig) and ahpa.bins == 7 and isinstance(sra, SraConfig) and sra.weight == 0.5
    assert values["align"]["ahpa"]["bins"] == 5, "the recipe itself is not changed"


@pytest.mark.parametrize("override", ["steps", "=3", "steps.more=3", "steps=[1", "ahpa.x={"])
def test_malformed_overrides_are_errors(override: str) -> None:
    with pytest.raises(UserError):
        parse({"steps": 5}, override)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 6, "accumulate": 4}, "accumulate"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"clip": -1.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"seed": -1}, "seed"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"align_until": -5}, "align_until"),
        ({"model": "SiT-XXL/2"}, "SiT-XXL/2"),
        ({"model": "DiT-B/2", "time_sampling": "lognormal"}, "time_sampling"),
        ({"model": "DiT-B/2", "path": "cosine"}, "path"),
        ({"method": "rapa"}, "rapa"),
        ({"method": "repa+repa"}, "twice"),
        ({"method": "none+repa"}, "none"),
        ({"method": "repa", "align": {"dya": {}}}, "dya"),
        ({"method": "repa", "align": {"repa": {"weight": -1}}}, "weight"),
        ({"method": "repa", "align": {"repa": {"features": ["dinov2-b@" + "9" * 5000]}}}, "does not name"),
        ({"shard": True, "precision": "fp16"}, "fp16"),
        ({"precision": "bf17"}, "precision"),
        ({"attention": "flash"}, "attention"),
    ],
)
def test_values_that_cannot_be_meant_are_errors(values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse(values)


def test_a_configuration_survives_its_own_file(tmp_path: Path) -> None:
    from trainer.runs.folder import load_config, save_config

    config = parse({"method": "ahpa+sra", "betas": [0.9, 0.95], "align": {"ahpa": {"groups": ["G3"]}}, "lr": 3e-5})
    save_config(tmp_path, config.settled())
    assert load_config(tmp_path) == config.settled()
    assert from_mapping(RunConfig, to_mapping(config)) == config


def test_missing_xformers_is_explained() -> None:
    import importlib.util

    if importlib.util.find_spec("xformers") is not None:
        pytest.skip("xformers is installed here")
    from trainer.models import build_model, model_config

    cfg = model_config("SiT-Ti/2", latent_channels=4, latent_size=8, num_classes=2, attention="xformers")
    with pytest.raises(UserError, match="not installed") as error:
        build_model(cfg)
    assert error.value.remedy is not None and "pip install xformers" in error.value.remedy
    assert "sdpa" in error.value.remedy


def test_a_setting_of_the_run_typed_as_one_of_a_method_is_refused_with_what_to_type() -> None:
    with pytest.raises(UserError, match="align_until is a setting of the run, not of ahpa") as error:
        apply_overrides({}, ["ahpa.align_until=30"])
    assert error.value.remedy == "Type --set align_until=30"
    assert apply_overrides({}, ["ahpa.bins=30"]) == {"align": {"ahpa": {"bins": 30}}}
