"""What two ranks exchange in a step, in which precision, how often; and that options of the step change no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import GATHERS, READS, REDUCTIONS
from test_distributed import STEPS, Outcome, alone, launch, plain
from tiny_runs import checkpoint_files, log_of
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from trainer.distributed import _gathered_as
from trainer.models.config import SIZES
from trainer.runs.log import OF_THE_MACHINE

DEPTH = 4  # blocks of the model
WATCHED = ("repa-accumulated", "repa-sharded", "repa-sharded-accumulated-bf16-recomputed")
MORE_WATCHED = ("repa", "repa-sharded-bf16", "repa-sharded-accumulated", "sra-sharded-accumulated-recomputed")
JOBS = ("ahpa-accumulated-recomputed", "ahpa-sharded-accumulated-recomputed")
# In pairs: replicated, sharded.
LOW = ("ahpa-bf16", "ahpa-sharded-bf16")
MORE_LOW = ("sra-bf16-accumulated", "sra-sharded-bf16-accumulated-recomputed")
COMPILED = {  # graphs with the options that must not add any
    "repa-compiled-accumulated-recomputed": 2,
    # Block, three embeddings, last layer, what comes before the model; after it with alignment and without.
    "repa-sharded-compiled-accumulated-recomputed": 8,
    "ahpa-sharded-compiled-bf16": 8,
    # The teacher's block and embeddings; what comes after the model is not compiled.
    "sra-sharded-compiled-recomputed": 10,
}


def of_ranks(cache: Path, folder: Path, watched: Sequence[str], others: Sequence[str]) -> Outcome:
    quiet = {"log_every": 100, "steps": 4}
    jobs: list[dict[str, Any]] = [
        {"name": f"w-{name}", "settings": plain(cache, name, **quiet) | {"name": f"w-{name}"}, "watch": True}
        for name in watched
    ]
    jobs += [{"name": name, "settings": plain(cache, name)} for name in others]
    return Outcome(folder / "runs", cache, launch(jobs, folder / "runs", folder / "seen"))


@pytest.fixture(scope="module")
def few(shapes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return of_ranks(shapes_cache, tmp_path_factory.mktemp("step-of-two-ranks"), WATCHED, (JOBS[1], *LOW))


@pytest.fixture(scope="module")
def more(shapes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("more-steps-of-two-ranks")
    return of_ranks(shapes_cache, folder, (*WATCHED, *MORE_WATCHED), (JOBS[0], *MORE_LOW, *COMPILED))


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Outcome:
    """Those of the fixture that a case names."""
    return request.getfixturevalue(request.param)


def cases(*groups: tuple[Sequence[Any], str]) -> list[Any]:
    """Each case with its fixture; what needs `more` is slow."""
    return [
        pytest.param(case, fixture, marks=[pytest.mark.slow] if fixture == "more" else [])
        for found, fixture in groups
        for case in found
    ]


def step_of(ranks: Outcome, name: str) -> list[tuple[str, str, int]]:
    """What the third of four steps exchanged: it neither logs nor saves. The same on both ranks."""
    first, second = (seen[f"w-{name}"]["steps"][2] for seen in ranks.ranks)
    assert first == second and first
    return [tuple(entry) for entry in first]


def reductions(step: list[tuple[str, str, int]]) -> list[tuple[str, int]]:
    """Of gradients and their norm; the hosts' signal is a whole number."""
    return [(dtype, size) for name, dtype, size in step if name in REDUCTIONS and dtype != "int32"]


def gathered(step: list[tuple[str, str, int]]) -> list[tuple[str, int]]:
    return [(dtype, size) for name, dtype, size in step if name in GATHERS]


def sizes(ranks: Outcome, name: str) -> tuple[int, int, int]:
    """Parameters of a block, of the model beside its blocks, and of the heads; padded to even rows."""
    files = checkpoint_files(ranks.root / f"w-{name}", 4)
    blocks = sum(v.numel() for k, v in files["model"].items() if k.startswith("blocks."))
    rest = sum(
        v.numel() + (v.numel() // len(v) if len(v) % 2 else 0) for k, v in files["model"].items() if "blocks." not in k
    )
    return blocks // DEPTH, rest, sum(v.numel() for v in files["alignment"].values())


@pytest.mark.parametrize(
    ("name", "ranks"), cases((["repa-accumulated"], "few"), (["repa"], "more")), indirect=["ranks"]
)
def test_replicated_ranks_reduce_once_a_step(ranks: Outcome, name: str) -> None:
    """The model's gradients in DDP's one bucket (this model fits), the heads' in one; nothing is gathered."""
    step, (block, _, heads) = step_of(ranks, name), sizes(ranks, name)
    files = checkpoint_files(ranks.root / f"w-{name}", 4)
    whole = sum(v.numel() for v in files["model"].values())
    assert whole > DEPTH * block
    assert reductions(step) == [("float32", whole), ("float32", heads)]
    assert not gathered(step)


@pytest.mark.parametrize(("name", "ranks"), cases((WATCHED[1:], "few"), (MORE_WATCHED[1:], "more")), indirect=["ranks"])
def test_sharded_ranks_reduce_once_a_step_in_float32(ranks: Outcome, name: str) -> None:
    """Each block and the rest once, whatever the number of micro-batches; the heads once; the norm's square, a scalar."""
    step, (block, rest, heads) = step_of(ranks, name), sizes(ranks, name)
    assert reductions(step) == [*[("float32", block)] * DEPTH, ("float32", rest), ("float32", heads), ("float32", 1)]
    last = max(i for i, (op, _, _) in enumerate(step) if op in GATHERS)
    norm = max(i for i, (op, dtype, size) in enumerate(step) if (op, dtype, size) == ("allreduce_", "float32", 1))
    assert last < norm, "neither clipping nor optimiser nor average gathers anything"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["more"], indirect=True)
def test_gathers_move_half_the_bytes_in_bfloat16(ranks: Outcome) -> None:
    """Blocks are gathered in bfloat16; of the rest time's and labels' embedding stay in float32, beside the others."""
    whole, low = step_of(ranks, "repa-sharded"), step_of(ranks, "repa-sharded-bf16")
    block, rest, _ = sizes(ranks, "repa-sharded")
    assert set(gathered(whole)) == {("float32", block), ("float32", rest)}
    by_dtype = dict(gathered(low))
    assert by_dtype["bfloat16"] == block and 2 * rest < by_dtype["uint8"] < 4 * rest
    assert len(gathered(low)) == len(gathered(whole))


@pytest.mark.parametrize(("name", "ranks"), cases((WATCHED, "few"), (MORE_WATCHED, "more")), indirect=["ranks"])
def test_no_rank_waits_for_its_device(ranks: Outcome, name: str) -> None:
    """All that is read is the hosts' signal, a number in their own memory."""
    assert [entry for entry in step_of(ranks, name) if entry[0] in READS] == [("_local_scalar_dense", "int32", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["more"], indirect=True)
def test_recomputation_gathers_no_more_often(ranks: Outcome) -> None:
    """Blocks are run anew while they are gathered for their backward pass; both passes of each micro-batch gather."""
    names = ("repa-sharded-accumulated", "repa-sharded-accumulated-bf16-recomputed")
    counts = [len(gathered(step_of(ranks, name))) for name in names]
    assert counts[0] == counts[1] <= 2 * 2 * (DEPTH + 1)


def curve(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in OF_THE_MACHINE} for record in log_of(run)]


def compare(a: Path, b: Path, *, rel: float, abs: float) -> None:
    one, two = curve(a), curve(b)
    assert len(one) == len(two) > 1
    for x, y in zip(one, two):
        assert y == pytest.approx(x, rel=rel, abs=abs)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(("name", "ranks"), cases((JOBS[1:], "few"), (JOBS[:1], "more")), indirect=["ranks"])
def test_two_ranks_of_two_micro_batches_follow_one(ranks: Outcome, tmp_path: Path, name: str) -> None:
    """Recomputing, against one rank that does not."""
    compare(alone(ranks, name, tmp_path, recompute="none"), ranks.root / name, rel=2e-4, abs=2e-5)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(("name", "ranks"), cases((LOW, "few"), (MORE_LOW, "more")), indirect=["ranks"])
def test_in_bfloat16_two_ranks_follow_autocast_on_one(ranks: Outcome, tmp_path: Path, name: str) -> None:
    """Within two units in bfloat16's last place (2^-8 each): a rank rounds the gradient of its half of the rows."""
    compare(alone(ranks, name, tmp_path), ranks.root / name, rel=2 * 2**-8, abs=1e-3)


@pytest.mark.parametrize(("pair", "ranks"), cases(([LOW], "few"), ([MORE_LOW], "more")), indirect=["ranks"])
def test_in_bfloat16_sharded_is_replicated(ranks: Outcome, pair: tuple[str, str]) -> None:
    """What is gathered in bfloat16 is what autocast casts: no more than float32's rounding lies between the two."""
    whole, sharded = pair
    compare(ranks.root / whole, ranks.root / sharded, rel=2e-4, abs=2e-5)
    files, others = (checkpoint_files(ranks.root / name, STEPS) for name in (whole, sharded))
    assert files.keys() == others.keys()
    for stem, tensors in files.items():
        assert tensors.keys() == others[stem].keys()
        for key, value in tensors.items():
            assert others[stem][key].dtype == value.dtype == torch.float32 and others[stem][key].shape == value.shape
    assert all(torch.allclose(v, others["ema"][k], atol=2e-3) for k, v in files["ema"].items())


@pytest.mark.slow
@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(("name", "ranks"), cases((list(COMPILED), "more")), indirect=["ranks"])
def test_options_add_no_graph_and_no_break(ranks: Outcome, tmp_path: Path, name: str) -> None:
    for seen in ranks.ranks:
        assert seen[name]["breaks"] == [] and seen[name]["graphs"] == COMPILED[name]
    tolerance = {"rel": 2 * 2**-8, "abs": 1e-3} if "-bf16" in name else {"rel": 2e-4, "abs": 2e-5}
    compare(alone(ranks, name, tmp_path, recompute="none"), ranks.root / name, **tolerance)


def test_a_group_of_one_dtype_needs_no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before PyTorch 2.15 groups of blocks are gathered in bfloat16 all the same, mixed ones whole."""
    low, high = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    mixed = _gathered_as([low, high], {low}, torch.bfloat16)
    assert mixed.param_dtype is torch.bfloat16 and mixed.reduce_dtype is torch.float32
    assert mixed.param_dtype_override_fn is not None
    assert mixed.param_dtype_override_fn(low) is None and mixed.param_dtype_override_fn(high) is torch.float32

    def earlier(param_dtype: Any = None, reduce_dtype: Any = None, cast_forward_inputs: bool = True) -> Any:
        return MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=cast_forward_inputs)

    monkeypatch.setattr("trainer.distributed.MixedPrecisionPolicy", earlier)
    assert _gathered_as([low], {low}, torch.bfloat16).param_dtype is torch.bfloat16
    assert _gathered_as([low, high], {low}, torch.bfloat16).param_dtype is None
    assert _gathered_as([high], set(), None).param_dtype is None


def test_the_model_has_that_many_blocks(nano: None) -> None:
    assert SIZES["Nano"][0] == DEPTH
