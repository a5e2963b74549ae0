"""LightningDiT: its layers against formulas of their own, its counts, its official files, and methods that train on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import published_forward, rotated
from tiny_runs import Listener, assert_identical, checkpoint_files, keep_only, log_of, losses, settings
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featcache.errors import UserError
from featcache.read.normalization import load, save
from trainer.diffusion.guidance import Guidance
from trainer.models import ModelConfig, Transformer, build_model, forward_flops, load_weights, model_config
from trainer.models.blocks import RMSNorm, RotaryEmbedding, SwiGlu, rotary_positions
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.runs.normalization import FILE
from trainer.runs.weights_io import export_official, import_official
from trainer.sampling.draw import SampleConfig, check_sampler, draw_latents, load_run
from trainer.training.loop import train

TINY = ModelConfig(
    family="sit",
    depth=3,
    width=48,
    heads=2,
    patch_size=1,
    latent_channels=6,
    latent_size=5,
    num_classes=5,
    norm="rms",
    mlp="swiglu",
    rope=True,
)


def randomised(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """A model in which no layer is left as it was initialised, and time matters as much as anything."""
    model = build_model(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "t_embedder" in name else 0.1) * torch.randn(parameter.shape, generator=generator))
    return model


def batch(cfg: ModelConfig, B: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, *cfg.latent_shape, generator=generator)
    return x, torch.linspace(0, 1, B), torch.arange(B) % (cfg.num_classes + 1)


@pytest.mark.parametrize(("width", "grid"), [(4, 3), (24, 5), (72, 16)])
def test_rotation_is_multiplication_by_complex_numbers(width: int, grid: int) -> None:
    rope = RotaryEmbedding(width, grid).double()
    rope.cos, rope.sin = (table.double() for table in rotary_positions(width, grid))
    x = torch.randn(2, 3, grid * grid, width, dtype=torch.float64)
    torch.testing.assert_close(rope(x), rotated(x, grid), rtol=0, atol=3e-6)  # tables are float32


def test_rotated_products_depend_on_the_offset_alone() -> None:
    """In float64, with exact tables: moving both tokens by the same rows and columns changes nothing."""
    grid, d = 6, 16
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(0, d // 2, 2, dtype=torch.float64) / (d // 2))
    angles = torch.cat(
        [
            rows.reshape(-1, 1) * frequencies.repeat_interleave(2),
            columns.reshape(-1, 1) * frequencies.repeat_interleave(2),
        ],
        dim=1,
    )
    rope = RotaryEmbedding(d, grid)
    for table, exact in zip(rotary_positions(d, grid), (angles.cos(), angles.sin())):
        torch.testing.assert_close(table, exact.float(), rtol=0, atol=1e-7)
    rope.cos, rope.sin = angles.cos(), angles.sin()
    q, k = torch.randn(2, d, dtype=torch.float64)
    products = rope(q.expand(1, 1, grid * grid, d))[0, 0] @ rope(k.expand(1, 1, grid * grid, d))[0, 0].T
    products = products.reshape(grid, grid, grid, grid)
    moved = products[1:, 2:, 1:, 2:] - products[:-1, :-2, :-1, :-2]
    assert moved.abs().max() < 1e-12
    assert products.std() > 0.1, "they do depend on the offset"
    torch.testing.assert_close(rope(q.expand(1, 1, 36, d)).norm(dim=-1), q.norm().expand(1, 1, 36))


def test_rms_norm_is_the_formula_in_float32_whatever_comes_in() -> None:
    norm = RMSNorm(72, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 7, 72) * 3 + 1

    def formula(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    torch.testing.assert_close(norm(x), formula(x), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, formula(x.bfloat16().float()), rtol=1e-6, atol=1e-6)
    tiny = torch.full((72,), 1e-6)
    torch.testing.assert_close(norm(tiny), formula(tiny))


def test_gated_mlp_is_the_formula() -> None:
    mlp = SwiGlu(12, 7).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    gate, value = x @ mlp.w12.weight[:7].T + mlp.w12.bias[:7], x @ mlp.w12.weight[7:].T + mlp.w12.bias[7:]
    expected = (gate / (1 + (-gate).exp()) * value) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    "change", [{}, {"qk_norm": True}, {"patch_size": 2, "latent_size": 6}, {"heads": 12}, {"latent_channels": 32}]
)
@torch.no_grad()
def test_forward_in_float64_against_an_independent_formula(change: dict[str, Any]) -> None:
    cfg = replace(TINY, **change)
    model = randomised(cfg).double()
    x, t, y = batch(cfg)
    expected = published_forward({**model.state_dict(), "pos_embed": model.pos_embed}, x, t, y, heads=cfg.heads)
    found = model(x.double(), t, y).prediction
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.std()))  # float32 rotary tables
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("change", "least"), [({"rope": False}, 1e-3), ({"norm": "layer"}, 1e-3), ({"mlp": "gelu"}, 1e-3)]
)
def test_every_flag_changes_the_function(change: dict[str, Any], least: float) -> None:
    """Alone too: weights that both models have are the same."""
    model, other = randomised(TINY), build_model(replace(TINY, **change))
    other.load_state_dict(model.state_dict(), strict=False)
    x, t, y = batch(TINY)
    difference = (model(x, t, y).prediction - other(x, t, y).prediction).abs().max()
    assert difference > least


def test_initialisation_is_sit_s_with_norms_of_one() -> None:
    cfg = replace(TINY, width=256, heads=4, qk_norm=True, num_classes=1000)
    model = build_model(cfg, seed=3)
    state = model.state_dict()
    for key, (fan_out, fan_in) in {
        "blocks.1.mlp.w12.weight": (2 * 682, 256),
        "blocks.2.mlp.w3.weight": (256, 682),
        "blocks.0.attn.qkv.weight": (3 * 256, 256),
        "x_embedder.proj.weight": (256, 6),
    }.items():
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert state[key].shape[:2] == (fan_out, fan_in)
        assert bound * 0.98 < state[key].abs().max() <= bound
        assert state[key].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for key, value in state.items():
        if "norm" in key:
            assert torch.equal(value, torch.ones_like(value)), key
        elif key.endswith("bias") or "adaLN_modulation" in key or key.startswith("final_layer.linear"):
            assert torch.count_nonzero(value) == 0, key
    assert sorted(key for key in state if "norm" in key and key.startswith(("blocks.0", "final"))) == [
        *("blocks.0.attn.k_norm.weight", "blocks.0.attn.q_norm.weight", "blocks.0.norm1.weight"),
        *("blocks.0.norm2.weight", "final_layer.norm_final.weight"),
    ]
    assert torch.count_nonzero(model(*batch(cfg)).prediction) == 0


def test_rotary_tables_are_neither_trained_nor_saved() -> None:
    model = build_model(TINY)
    assert not any("rope" in key for key in (*model.state_dict(), *dict(model.named_parameters())))
    cos, sin = rotary_positions(24, 5)
    ropes = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    assert len(ropes) == 1, "all blocks share one"
    assert torch.equal(ropes[0].cos, cos) and torch.equal(ropes[0].sin, sin)


# Computed with the public code (depth 28, width 1152, patch 1, 32 channels, 1000 classes and the null label).
def test_counts_are_the_public_code_s() -> None:
    cfg = model_config("LightningDiT-XL/1", latent_channels=32, latent_size=16, num_classes=1000)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == 674_961_824
    assert round(forward_flops(cfg) / 1e9) == 237


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [
        ("LightningDiT-B/1", (12, 768, 12), 2048),
        ("LightningDiT-L/2", (24, 1024, 16), 2730),
        ("LightningDiT-XL/2", (28, 1152, 16), 3072),
        ("LightningDiT-1p0B/1", (24, 1536, 24), 4096),
        ("LightningDiT-1p6B/2", (28, 1792, 28), 4778),
    ],
)
def test_sizes_are_the_public_code_s(name: str, shape: tuple[int, int, int], hidden: int) -> None:
    cfg = model_config(name, latent_channels=32, latent_size=16, num_classes=1000)
    assert (cfg.depth, cfg.width, cfg.heads) == shape
    assert (cfg.mlp_width, cfg.name, cfg.family) == (hidden, name, "sit")


@pytest.mark.parametrize("change", [{}, {"qk_norm": True, "patch_size": 5}, {"rope": False}, {"mlp": "gelu"}])
def test_counted_operations_are_the_module_s(change: dict[str, Any]) -> None:
    cfg = replace(TINY, **change)
    inputs = batch(cfg, B=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        build_model(cfg)(*inputs)
    assert forward_flops(cfg) == counter.get_total_flops()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_breaks(autocast: bool) -> None:
    torch._dynamo.reset()
    cfg = replace(TINY, depth=2, qk_norm=True)
    model, inputs = randomised(cfg), batch(cfg)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for options in ({"taps": (1, 2)}, {"taps": (1,), "stop_after": 1}):
            ours, expected = compiled(*inputs, **options), model(*inputs, **options)
            for depth in expected.hidden:
                torch.testing.assert_close(ours.hidden[depth], expected.hidden[depth])
            if expected.prediction is not None:
                torch.testing.assert_close(ours.prediction, expected.prediction)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm": "batch"}, "Unknown norm"),
        ({"mlp": "relu"}, "Unknown MLP"),
        ({"width": 36, "heads": 6}, "divisible by 4"),
    ],
)
def test_impossible_configurations_are_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(TINY, **change)


@pytest.mark.parametrize("name", ["SiT-1p0B/1", "LightningDiT-1p0B/3", "LightningDiT-M/1", "lightningdit-xl/1"])
def test_unknown_names_are_explained(name: str) -> None:
    with pytest.raises(UserError, match="Unknown model"):
        model_config(name, latent_channels=32, latent_size=16, num_classes=10)


def test_mixtures_of_flags_have_no_name() -> None:
    cfg = model_config("LightningDiT-B/1", latent_channels=32, latent_size=16, num_classes=10)
    assert replace(cfg, rope=False).name is None
    assert replace(cfg, norm="layer", mlp="gelu", rope=False).name == "SiT-B/1"
    assert replace(cfg, depth=11).name is None


# The public code's files.


def official_state(seed: int = 1, **change: Any) -> dict[str, Tensor]:
    """A state dict under the public names; time runs their way round, which no value shows."""
    cfg = replace(TINY, latent_channels=32, **change)
    model = randomised(cfg, seed)
    side, d = cfg.grid, cfg.width // cfg.heads
    # In float32 and step by step, as the public code fills its buffers.
    frequencies = 1.0 / 10000 ** (torch.arange(0, d // 2, 2).float() / (d // 2))
    angles = (torch.arange(side).float()[:, None] * frequencies).repeat_interleave(2, dim=1)
    tables = torch.stack([torch.cat([angles[i], angles[j]]) for i in range(side) for j in range(side)])
    rotary = {"feat_rope.freqs_cos": tables.cos(), "feat_rope.freqs_sin": tables.sin()}
    return {"pos_embed": model.pos_embed.clone(), **(rotary if cfg.rope else {}), **model.state_dict()}


def public_file(path: Path, state: dict[str, Tensor], **sections: Any) -> Path:
    """A checkpoint as the public training script writes one."""
    config = {
        "data": {"num_classes": 5, "latent_norm": True, "latent_multiplier": 1.0},
        "model": {"model_type": "LightningDiT-XL/1", "use_rmsnorm": True, "use_swiglu": True, "use_rope": True},
        "transport": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "use_lognorm": True},
    }
    torch.save(
        {"model": state, "ema": state, "opt": {"state": {}, "param_groups": []}, "config": config | sections}, path
    )
    return path


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"patch_size": 2, "latent_size": 6}, {"mlp_ratio": 2.5}])
@torch.no_grad()
def test_an_official_file_gives_the_published_velocities_with_time_turned_round(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    state = official_state(**change)
    imported = import_official(public_file(tmp_path / "0080000.pt", state))
    cfg = imported.config
    assert cfg == replace(TINY, latent_channels=32, **change)
    assert (imported.convention, imported.path, imported.normalization) == ("lightningdit", "linear", "channel")
    model = build_model(cfg)
    load_weights(model, imported.state)
    x, t, y = batch(cfg, B=5)
    theirs = published_forward(state, x, 1 - t, y, heads=2)  # data - noise, t = 1 is data
    ours = model.double()(x.double(), t.double(), y).prediction
    torch.testing.assert_close(ours, -theirs, rtol=0, atol=2e-5 * float(theirs.std()))
    apart = published_forward(state, x, t, y, heads=2)
    assert (ours + apart).abs().max() > 0.05 * theirs.std(), "the direction of time matters in this test"


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}])
@torch.no_grad()
def test_an_export_is_loaded_strictly_and_predicts_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    cfg = replace(TINY, latent_channels=32, **change)
    ema, raw = randomised(cfg, 1), randomised(cfg, 2)
    file = export_official(
        tmp_path / "o.pt", cfg, ema=ema.state_dict(), model=raw.state_dict(), step=9, normalization="channel"
    )
    content = torch.load(file, weights_only=True)
    assert content["ema"].keys() == content["model"].keys() == official_state(**change).keys()
    assert content["config"]["model"] == {
        **{"model_type": None, "use_qknorm": bool(change), "use_swiglu": True, "use_rope": True},
        **{"use_rmsnorm": True, "wo_shift": False, "in_chans": 32},
    }
    for key, value in official_state(**change).items():
        if key.startswith("feat_rope"):
            torch.testing.assert_close(content["ema"][key], value, rtol=0, atol=1e-6)
    x, t, y = batch(cfg, B=5)
    theirs = published_forward(content["ema"], x, 1 - t, y, heads=2)
    ours = ema.double()(x.double(), t.double(), y).prediction
    torch.testing.assert_close(-theirs, ours, rtol=0, atol=2e-5 * float(ours.std()))
    back = import_official(file, weights="model")
    assert (back.config, back.step, back.normalization) == (cfg, 9, "channel")
    for key, value in raw.state_dict().items():
        torch.testing.assert_close(back.state[key], value, rtol=0, atol=1e-6)


def test_what_the_file_says_of_its_latents_is_taken(tmp_path: Path) -> None:
    state = official_state()
    scalar = public_file(tmp_path / "a.pt", state, data={"latent_norm": False})
    curved = public_file(tmp_path / "b.pt", state, transport={"path_type": "GVP", "prediction": "velocity"})
    other = public_file(tmp_path / "c.pt", state, transport={"path_type": "Linear", "prediction": "noise"})
    assert import_official(scalar).normalization == "scalar"
    assert import_official(curved).path == "cosine"
    with pytest.raises(UserError, match="only velocity models"):
        import_official(other)
    torch.save(state, tmp_path / "bare.pt")
    bare = import_official(tmp_path / "bare.pt")
    assert (bare.convention, bare.normalization, bare.config.heads) == ("lightningdit", "channel", 2)


def test_its_code_with_all_switches_off_still_runs_time_its_way(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "rope": False}
    state = official_state(**plain)
    file = public_file(tmp_path / "a.pt", state, model={"model_type": "LightningDiT-B/1", "use_rmsnorm": False})
    imported = import_official(file, heads=2)
    assert (imported.convention, imported.config.backbone) == ("lightningdit", "SiT")
    assert torch.equal(imported.state["final_layer.linear.weight"], -state["final_layer.linear.weight"])


def test_sizes_are_recognised(tmp_path: Path) -> None:
    cfg = model_config("LightningDiT-Ti/1", latent_channels=32, latent_size=4, num_classes=5)
    file = export_official(tmp_path / "o.pt", cfg, ema=build_model(cfg).state_dict())
    imported = import_official(file)
    assert (imported.name, imported.config) == ("LightningDiT-Ti/1", cfg)


def test_other_rotary_tables_are_refused(tmp_path: Path) -> None:
    state = official_state()
    cos, sin = state["feat_rope.freqs_cos"], state["feat_rope.freqs_sin"]
    rounded = {**state, "feat_rope.freqs_cos": cos.bfloat16(), "feat_rope.freqs_sin": sin.bfloat16()}
    import_official(public_file(tmp_path / "half.pt", rounded))
    split = torch.cat([cos[:, ::2], cos[:, 1::2]], dim=1)  # pairs half a head apart instead of neighbours
    for bad in ({"feat_rope.freqs_cos": split}, {"feat_rope.freqs_sin": -sin}, {"feat_rope.freqs_cos": cos[:, :8]}):
        with pytest.raises(UserError, match=r"feat_rope\.freqs_\w+ is not the table"):
            import_official(public_file(tmp_path / "bad.pt", {**state, **bad}), heads=2)
    del state["feat_rope.freqs_sin"]
    with pytest.raises(UserError, match=r"feat_rope\.freqs_sin is not the table"):
        import_official(public_file(tmp_path / "bad.pt", state))


def test_files_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    state = official_state()
    file = public_file(tmp_path / "a.pt", state)
    with pytest.raises(UserError, match="holds LightningDiT, which 'repa' checkpoints do not"):
        import_official(file, convention="repa")
    without_shift = {k: v[: 4 * 48] if "blocks" in k and "adaLN" in k else v for k, v in state.items()}
    with pytest.raises(UserError, match=r"adaLN_modulation\.1\.weight is \[192, 48\], expected \[288, 48\]"):
        import_official(public_file(tmp_path / "b.pt", without_shift))
    both = state | {"blocks.0.mlp.fc1.weight": torch.zeros(4, 48)}
    with pytest.raises(UserError, match=r"unexpected blocks\.0\.mlp\.fc1"):
        import_official(public_file(tmp_path / "c.pt", both))
    cfg = replace(TINY, latent_channels=32)
    for convention in ("repa", "sra", "sit", "dit"):
        with pytest.raises(UserError, match="LightningDiT weights cannot be written as") as error:
            export_official(tmp_path / "o.pt", cfg, ema=build_model(cfg).state_dict(), convention=convention)
        assert "lightningdit" in str(error.value.remedy)


def test_an_import_needs_the_numbers_that_its_latents_were_normalised_by(tmp_path: Path) -> None:
    cfg = model_config("LightningDiT-Ti/1", latent_channels=32, latent_size=16, num_classes=1000)
    file = export_official(tmp_path / "o.pt", cfg, ema=build_model(cfg).state_dict(), normalization="channel")
    common: dict[str, Any] = {"weights": "ema", "convention": None, "root": tmp_path / "runs"}
    with pytest.raises(UserError, match="normalised by channel") as error:
        import_checkpoint(file, name="a", **common)
    assert "--statistics" in str(error.value.remedy)
    mean, std = torch.randn(1, 32, 1, 1), torch.rand(1, 32, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")  # as the public code does
    run = import_checkpoint(file, name="a", statistics=tmp_path / "latents_stats.pt", **common)
    loaded = load_run(run)
    assert (loaded.config.normalization, loaded.config.model) == ("channel", "LightningDiT-Ti/1")
    assert (loaded.resolution, loaded.summary["dataset"]["vae"]["name"]) == (256, "va-vae")
    kept = load(run / FILE)
    assert torch.equal(kept.mean, mean[0]) and torch.equal(kept.std, std[0])
    torch.save({"mean": mean[:, :4], "std": std[:, :4]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"shape \[4, 1, 1\], and the checkpoint's latents \[32, 16, 16\]"):
        import_checkpoint(file, name="b", statistics=tmp_path / "other.pt", **common)
    assert not (tmp_path / "runs/b").exists()


@pytest.mark.usefixtures("nano")
def test_a_run_goes_out_and_comes_back_with_its_statistics(
    shapes_cache: Path, statistics: dict[str, Path], tmp_path: Path
) -> None:
    config = settings(shapes_cache, model="LightningDiT-Nano/2", steps=2, statistics=str(statistics["channel"]))
    run = train(config, resume=False, watcher=Listener(), root=tmp_path)
    file = export_checkpoint(run, tmp_path / "weights.pt", convention=None, step=None)
    assert torch.load(file, weights_only=True)["config"]["data"]["latent_norm"] is True
    back = import_checkpoint(
        file,
        name="back",
        weights="ema",
        convention=None,
        cache=str(shapes_cache),
        statistics=run / FILE,
        root=tmp_path,
    )
    kept, given = load(back / FILE), load(run / FILE)
    assert torch.equal(kept.mean, given.mean) and torch.equal(kept.std, given.std)
    assert kept.fingerprint == given.fingerprint
    ours, theirs = load_run(run).model, load_run(back).model
    x, t, y = batch(ours.cfg)
    torch.testing.assert_close(ours(x, t, y).prediction, theirs(x, t, y).prediction, rtol=0, atol=1e-6)
    old = load(statistics["channel"])
    save(replace(old, fingerprint="0" * 64), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another cache"):
        import_checkpoint(
            file,
            name="other",
            weights="ema",
            convention=None,
            cache=str(shapes_cache),
            statistics=tmp_path / "other.safetensors",
            root=tmp_path,
        )


# Methods, which see hidden tokens, depth and width alone.

METHODS = ("repa", "ahpa", "sra", "sra2", "dya", "sara")


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("method", METHODS)
def test_methods_train_resume_and_sample(shapes_cache: Path, tmp_path: Path, method: str) -> None:
    common = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 2, "model": "LightningDiT-Nano/1"}
    config = settings(shapes_cache, method, **common)
    whole = train(config, resume=False, watcher=Listener(), root=tmp_path / "whole")
    keep_only(whole, 2, tmp_path / "cut/run")
    resumed = train(config, resume=True, watcher=Listener(), root=tmp_path / "cut")
    assert_identical(whole, resumed, 4)
    records = log_of(whole)
    assert any(name.startswith("align/") for record in records for name in record)
    before, after = (checkpoint_files(whole, step)["model"] for step in (2, 4))
    still = [key for key in before if torch.equal(before[key], after[key])]
    assert not still, "every weight moves once the gates are open, norms and gated MLP too"
    loaded = load_run(whole)
    labels = torch.tensor([0, 3])
    how = SampleConfig(sampler="sde", steps=3, guidance=Guidance(scale=2.0, channels=3))
    drawn = draw_latents(loaded.model, labels, [0, 1], how, transport=loaded.transport)
    assert drawn.shape == (2, *loaded.model.cfg.latent_shape) and torch.isfinite(drawn).all()
    with pytest.raises(UserError, match="does not go with a SiT or LightningDiT model"):
        check_sampler(loaded.model.cfg.family, "ddim")


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "graphs"),
    [("none", 1), *(pytest.param(m, 2, marks=pytest.mark.slow) for m in METHODS)],
)
def test_a_step_is_one_compiled_region_as_with_sit(
    shapes_cache: Path, tmp_path: Path, method: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **kw: real(m, **kw, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    common = {"steps": 6, "log_every": 3, "align_until": 4, "seed": 2, "model": "LightningDiT-Nano/2"}
    config = settings(shapes_cache, method, compile=True, **common)
    compiled = train(config, resume=False, watcher=Listener(), root=tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    eager = train(settings(shapes_cache, method, **common), resume=False, watcher=Listener(), root=tmp_path / "eager")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
