"""Checkpoints: complete or absent, found by step, kept in number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featcache.errors import UserError
from trainer.runs import checkpoint


def save(run: Path, step: int, keep: int = 2) -> Path:
    tensors = {"model": {"w": torch.full((3,), float(step))}, "ema": {"w": torch.zeros(0)}}
    return checkpoint.save_checkpoint(run, step, tensors, {"time_s": 1.5}, keep=keep)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path.name == "step_0000012"
    assert checkpoint.load_tensors(path, "model")["w"].tolist() == [12.0] * 3
    assert checkpoint.load_state(path) == {"step": 12, "time_s": 1.5}
    assert checkpoint.find_checkpoint(tmp_path) == (12, path)


def test_the_latest_is_by_step_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (9, 10, 99, 100, 20_000_000):
        save(tmp_path, step, keep=3)
    assert [s for s, _ in checkpoint.list_checkpoints(tmp_path)] == [99, 100, 20_000_000]
    assert checkpoint.find_checkpoint(tmp_path)[0] == 20_000_000
    assert checkpoint.find_checkpoint(tmp_path, 99)[0] == 99
    with pytest.raises(UserError, match="no checkpoint at step 10") as error:
        checkpoint.find_checkpoint(tmp_path, 10)
    assert error.value.remedy == "It has: 99, 100, 20000000; choose one with --step"


def test_leftovers_of_killed_processes_are_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in (".step_0000002.partial", ".step_0000000.removed"):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text("{}")
    (folder / "step_0000003").mkdir()  # no state.json: not one of ours
    assert [s for s, _ in checkpoint.list_checkpoints(tmp_path)] == [1]
    save(tmp_path, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_0000001", "step_0000002", "step_0000003"]


def test_checkpoints_behind_a_link_are_left_alone(tmp_path: Path) -> None:
    """Saving removes old ones: behind a link they may be another run's."""
    save(tmp_path / "other", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
    for call in (lambda: checkpoint.find_checkpoint(tmp_path / "run"), lambda: save(tmp_path / "run", 2, keep=1)):
        with pytest.raises(UserError, match="checkpoints is a symbolic link"):
            call()
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "other")] == [1]


def test_without_checkpoints_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find_checkpoint(tmp_path)


@given(position=st.integers(0, 200), flip=st.integers(1, 255))
def test_damaged_files_are_errors_never_garbage(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    """A changed byte in the header is either noticed or leaves the file a valid one of the same tensors' sizes."""
    run = tmp_path_factory.mktemp("run")
    path = save(run, 1)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= flip
    file.write_bytes(bytes(data))
    try:
        loaded = checkpoint.load_tensors(path, "model")
    except UserError as error:
        assert error.remedy is not None and "Remove this checkpoint" in error.remedy
    else:
        assert all(t.nbytes == 12 for t in loaded.values())


def test_truncated_and_missing_files_are_errors(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-4])
    (path / "state.json").write_text('{"step": 1')
    for stem in ("model", "optimizer"):
        with pytest.raises(UserError, match=stem):
            checkpoint.load_tensors(path, stem)
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.load_state(path)


def test_an_optimiser_s_state_goes_by_names_not_positions() -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    first = torch.optim.AdamW([*a.parameters(), *b.parameters()], fused=True)
    (a(torch.randn(4, 2)).square().sum()).backward()  # b never had a gradient
    first.step()
    names: dict[torch.Tensor, str] = {p: f"a.{n}" for n, p in a.named_parameters()}
    names |= {p: f"b.{n}" for n, p in b.named_parameters()}
    saved = checkpoint.optimizer_tensors(first, names)
    assert {key.split("/")[1] for key in saved} == {"a.weight", "a.bias"}
    second = torch.optim.AdamW([*b.parameters(), *a.parameters()], fused=True)
    checkpoint.load_optimizer(second, saved, names)
    for parameter in a.parameters():
        assert second.state[parameter].keys() == first.state[parameter].keys()
        for moment, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][moment], value)
    assert not second.state.get(b.weight)
    with pytest.raises(UserError, match=r"'a\.weight'"):
        checkpoint.load_optimizer(second, saved, {p: n for p, n in names.items() if n.startswith("b")})


def test_another_module_s_state_is_an_error(tmp_path: Path) -> None:
    path = checkpoint.save_checkpoint(tmp_path, 1, {"alignment": {"x": torch.zeros(2)}}, {}, keep=1)
    with pytest.raises(UserError, match="does not fit this run"):
        checkpoint.load_module(nn.Linear(2, 2), path, "alignment")
