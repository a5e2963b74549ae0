"""`benchmarks/gpu.py` on stages that are made up: what it keeps, leaves out, ends and shows."""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from featcache.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The script's modules, found as when it is typed; the folder has names of the standard library, so it goes again."""
    names = ("gpu_record", "gpu_tables", "gpu_pack", "kernels", "gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


@pytest.fixture
def gpu(modules: dict[str, ModuleType]) -> Any:
    return modules["gpu"]


def stages(gpu: Any, *names: str, seconds: float = 1.0, limit_s: float = 20.0) -> list[Any]:
    return [gpu.Stage(name=name, about="made up", seconds=seconds, limit_s=limit_s) for name in names]


def words(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(gpu: Any, made_up: list[Any], folder: Path, codes: dict[str, str], *, seconds: float = 60.0) -> Any:
    """Runs what `order` gives; the names of the stages that were begun, and of those for which there was no time."""
    record, begun = gpu.Record(folder), []

    def command(stage: Any) -> list[str]:
        begun.append(stage.name)
        return words(codes.get(stage.name, "pass"))

    until = time.monotonic() + seconds
    left = gpu.run_stages(gpu.order(made_up, record, again=False), record, command, until=until, log=folder / "gpu.log")
    return begun, [stage.name for stage in left]


def reporting(folder: Path, stage: str, more: str = "") -> str:
    """A program that reports a figure, then does `more`."""
    return (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from pathlib import Path; from gpu_record import Record; "
        f"Record(Path({str(folder)!r})).report({stage!r}, 'rate', 7.5); {more}"
    )


def test_figures_stay_and_what_is_done_is_not_done_again(gpu: Any, tmp_path: Path) -> None:
    made_up = stages(gpu, "a", "b", "c")
    codes = {"a": reporting(tmp_path, "a"), "b": "import sys; print('first'); sys.exit('no such kernel')"}
    assert run(gpu, made_up, tmp_path, codes) == (["a", "b", "c"], [])
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [found[name]["status"] for name in "abc"] == ["done", "failed", "done"]
    assert found["a"]["figures"] == {"rate": 7.5}
    assert found["b"]["error"] == "first\nno such kernel"
    later = [*made_up, *stages(gpu, "d")]
    assert run(gpu, later, tmp_path, {}) == (["d", "b"], [])  # what failed comes last
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert found["b"]["status"] == "done" and found["b"]["error"] == "" and found["a"]["figures"] == {"rate": 7.5}


def test_a_stage_is_ended_with_what_it_started_and_keeps_its_figures(gpu: Any, tmp_path: Path) -> None:
    child = "import subprocess; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
    codes = {"slow": reporting(tmp_path, "slow", child)}
    begun, _ = run(gpu, stages(gpu, "slow", limit_s=3) + stages(gpu, "next"), tmp_path, codes)
    assert begun == ["slow", "next"]
    entry = json.loads((tmp_path / "gpu.json").read_text())["stages"]["slow"]
    assert entry["status"] == "out of time" and entry["figures"] == {"rate": 7.5} and 3 <= entry["seconds"] < 10
    pid = int(entry["error"])
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the stage started is still there")


def test_what_does_not_fit_is_left_and_a_shorter_stage_takes_its_place(gpu: Any, tmp_path: Path) -> None:
    made_up = stages(gpu, "long", seconds=400, limit_s=500) + stages(gpu, "short")
    assert run(gpu, made_up, tmp_path, {}, seconds=100) == (["short"], ["long"])
    assert gpu.Record(tmp_path).status("long") is None
    assert run(gpu, made_up, tmp_path, {}, seconds=2) == ([], ["long"])  # less than is kept for ending


def test_what_a_stage_took_before_counts(gpu: Any, tmp_path: Path) -> None:
    record, (stage,) = gpu.Record(tmp_path), stages(gpu, "a", seconds=400)
    assert gpu._expected(stage, record) == 400
    record.update("a", status="failed", seconds=2.0)
    assert gpu._expected(stage, record) == 400
    record.update("a", status="done", seconds=30.0)
    assert gpu._expected(stage, record) == 30


def typed(gpu: Any, *text: str) -> Any:
    import typer

    app = typer.Typer()
    app.command()(gpu.main)
    return CliRunner().invoke(app, list(text))


def test_every_stage_of_the_table_has_its_function(gpu: Any, modules: dict[str, ModuleType]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        functions = importlib.import_module("gpu_stages").STAGES
        sys.modules.pop("gpu_stages")
    assert {stage.name for stage in gpu.STAGES} == set(functions)
    assert all(stage.seconds <= stage.limit_s <= 9 * 60 for stage in gpu.STAGES), "each fits into one call"
    assert len({stage.name for stage in gpu.STAGES}) == len(gpu.STAGES)


def test_the_stages_are_listed_and_unknown_ones_refused(gpu: Any, tmp_path: Path) -> None:
    listed = typed(gpu, "--list").output.splitlines()
    assert [line.split()[0] for line in listed] == [stage.name for stage in gpu.STAGES]
    assert len(typed(gpu, "--list", "--only", "peer,machine").output.splitlines()) == 2
    wrong = typed(gpu, "--only", "tset", "--out", str(tmp_path))
    assert isinstance(wrong.exception, UserError) and "no stage 'tset'" in str(wrong.exception)


def test_small_figures_are_not_mixed_with_others_and_a_strange_file_is_refused(gpu: Any, tmp_path: Path) -> None:
    record = gpu.Record(tmp_path)
    record.begin(small=True)
    record.update("machine", status="done")
    with pytest.raises(UserError, match="with --small"):
        record.begin(small=False)
    for text in ("[]", "{", '{"stages": {"a": {"status": "perfect"}}}', '{"stages": []}'):
        record.path.write_text(text)
        with pytest.raises(UserError):
            record.read()


def test_an_earlier_record_is_gone_on_with_in_a_new_folder(gpu: Any, tmp_path: Path) -> None:
    before = gpu.Record(tmp_path / "before")
    before.begin(small=False)
    before.update("machine", status="done", seconds=1.0, figures={"peak_tflops": 989.0})
    out = tmp_path / "out"
    # No stage fits into three seconds, and the machine's is done.
    text = ["--out", str(out), "--minutes", "0.05", "--start", str(before.path)]
    assert typed(gpu, *text).exit_code == 0
    assert gpu.Record(out).read() == before.read()
    again = typed(gpu, *text)
    assert isinstance(again.exception, UserError) and "is there already" in str(again.exception)
    assert "FEATCACHE_DEBUG" not in os.environ


RECORD: dict[str, Any] = {
    "small": False,
    "stages": {
        "machine": {
            "status": "done",
            "seconds": 20.0,
            "figures": {
                "machine": {"gpu": "NVIDIA H100", "cores": 16, "cpu": "x", "packages": {"torch": "2.11.0"}},
                "matmul_tflops_bfloat16": 798.2,
            },
        },
        "step-ahpa": {
            "status": "done",
            "seconds": 200.0,
            "figures": {
                "options": {"batch_size": 128},
                "none": {"step_ms": 250.0, "images_per_s": 512.0, "mfu": 0.371, "time_against_vanilla": 1.0},
                "ahpa": {
                    "step_ms": 260.0,
                    "images_per_s": 492.3,
                    "mfu": 0.356,
                    "time_against_vanilla": 1.04,
                    "peak_bytes_together": 60 * 2**30,
                },
            },
        },
        "encode": {
            "status": "done",
            "seconds": 80.0,
            "figures": {
                "tf32": {
                    "images_per_s": 400.0,
                    "imagenet_minutes": 53.4,
                    "relative_error": {"vae/G3": 3e-4, "vae/moments": 5e-4},
                }
            },
        },
        "feeding": {
            "status": "out of time",
            "seconds": 300.0,
            "error": "a\nb",
            "figures": {"training_cold": [{"images_per_s": 480.0, "waiting_share": 0.004}]},
        },
        "demo": {"status": "failed", "seconds": 3.0, "error": "Traceback\nValueError: [bold]", "figures": {}},
    },
}


def test_the_tables_hold_what_was_measured(modules: dict[str, ModuleType]) -> None:
    text = modules["gpu_tables"].markdown(RECORD)
    assert "On NVIDIA H100, 16 cores of x, torch 2.11.0, measured: bf16 products 798 TFLOP/s." in text
    assert "| `ahpa` | 128 | 260 | 492 | 35.6 % | +4.0 % | +5 % | 60.0 |" in text
    assert "| `none` | 128 | 250 | 512 | 37.1 % | - | - | - |" in text
    assert "| tf32 | no | 400 | 53 | 5.0e-04 (`vae/moments`) |" in text
    assert "| AHPA, cold | 480 | 0.40 % |" in text
    assert "Not finished: `feeding`: out of time, `demo`: failed." in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") >= 4
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(modules["gpu_tables"].summary(RECORD, ["machine", "step-ahpa", "demo", "peer", "tests"], ["peer"]))
    shown = console.export_text()
    assert "ahpa 492 images/s (+4.0 %)" in shown and "ValueError: [bold]" in shown
    assert "no time" in next(line for line in shown.splitlines() if "peer" in line)


def test_a_record_of_nothing_has_empty_tables(modules: dict[str, ModuleType]) -> None:
    assert modules["gpu_tables"].markdown({"stages": {}}) == ""


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<72, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix product"),
        ("triton_poi_fused_add_mul_3", "generated"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser and average"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),
        ("void at::native::reduce_kernel<512, 1>", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(modules: dict[str, ModuleType], kernel: str, kind: str) -> None:
    assert modules["kernels"].kind_of(kernel) == kind


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=12))
def test_busy_time_counts_each_moment_once(modules: dict[str, ModuleType], runs: list[tuple[int, int]]) -> None:
    """Against the number of unit intervals that some kernel covers."""
    spans = [modules["kernels"].Span("k", start, start + length) for start, length in runs]
    covered = {moment for start, length in runs for moment in range(start, start + length)}
    assert modules["kernels"].busy_us(spans) == len(covered)


def test_a_profile_s_shares_and_sums(modules: dict[str, ModuleType]) -> None:
    Span = modules["kernels"].Span
    spans = [Span("nvjet_a", 0, 600), Span("triton_b", 500, 1000), Span("nvjet_a", 3000, 4000)]
    found = modules["kernels"].summed(spans, 2)
    assert found["ms_per_step"]["matrix product"] == 0.8 and found["ms_per_step"]["generated"] == 0.25
    assert found["idle_share"] == pytest.approx(0.5) and found["kernels_per_step"] == 1.5
    assert [entry["kernel"] for entry in found["longest"]] == ["nvjet_a", "triton_b"]
    assert modules["kernels"].summed([], 1)["idle_share"] is None


def test_what_is_packed_is_told_and_bounded(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = modules["gpu_pack"]
    photographs = tmp_path / "from" / "n1"
    photographs.mkdir(parents=True)
    (photographs / "a.JPEG").write_bytes(b"x" * 1000)
    (photographs / "notes.txt").write_text("left out")
    (photographs / "link.jpg").symlink_to("/etc/hostname")
    wheel = tmp_path / "made_up-1-py3-none-any.whl"
    wheel.write_bytes(b"y" * 5000)
    monkeypatch.setattr(pack, "wheels", lambda folder: [wheel])
    monkeypatch.setattr(pack, "code_bytes", lambda root: 100_000)
    (tmp_path / "to" / "wheels").mkdir(parents=True)
    text = pack.pack(tmp_path / "to", BENCHMARKS.parent, tmp_path / "from")
    assert "made_up-1" in text and [p.name for p in (tmp_path / "to/photographs").rglob("*.*")] == ["a.JPEG"]
    (own,) = (tmp_path / "to/wheels").iterdir()
    site = tmp_path / "site"
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), str(own)]
    subprocess.run(words, check=True)
    (installed,) = metadata.distributions(path=[str(site)])
    assert installed.version == metadata.version("featcache-trainer")
    assert {entry.name for entry in installed.entry_points} == {"featcache", "trainer"}
    with pytest.raises(UserError, match="of photographs"):
        pack.report(pack.LIMIT_BYTES, [wheel], 0)


def test_the_plain_loop_is_the_same_model(modules: dict[str, ModuleType]) -> None:
    """The trainer's weights fit its parameters by name, and give the same prediction and hidden state."""
    import torch

    from trainer.models import build_model, model_config

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        plain = importlib.import_module("plain")
        sys.modules.pop("plain")
    cfg = model_config("SiT-Ti/2", latent_channels=4, latent_size=8, num_classes=10)
    ours = build_model(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs = plain.PlainSiT(cfg)
    theirs.load_state_dict(ours.state_dict())
    x, t, y = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 10])
    expected = ours(x, t, y, taps=(4,))
    out, hidden = theirs(x, t, y, tap=4)
    assert torch.allclose(out, expected.prediction, atol=1e-4)
    assert torch.allclose(hidden, expected.hidden[4], atol=1e-4)


@pytest.mark.parametrize("online", [False, True])
def test_the_plain_loop_trains(modules: dict[str, ModuleType], online: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from trainer.models import model_config

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plain = importlib.import_module("plain")
    sys.modules.pop("plain")

    class Encoder(torch.nn.Module):
        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean() + torch.zeros(len(images), 17, 768)

    import timm

    monkeypatch.setattr(timm, "create_model", lambda *a, **kw: Encoder())
    cfg = model_config("SiT-Ti/2", latent_channels=4, latent_size=8, num_classes=10)
    loop = plain.PlainLoop(cfg, 2, torch.device("cpu"), online=online, precision="fp32")
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    loop.step()
    first = loop.loss_sum
    loop.step()
    assert 0 < first < 100 and loop.loss_sum != 2 * first
    changed = [not torch.equal(a, b) for a, b in zip(before, loop.model.parameters())]
    assert sum(changed) > len(changed) // 2


def test_a_stage_ends_where_the_script_is_killed(tmp_path: Path) -> None:
    """With what it has started, and its folder."""
    work = tmp_path / "work"
    work.mkdir()
    child = (
        "import os, pathlib, subprocess, sys, time; from gpu_stages import end_with; "
        f"end_with(os.getppid(), pathlib.Path({str(work)!r})); "
        "beside = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(os.getpid(), beside.pid, flush=True); time.sleep(60)"
    )
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    script = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment)
    assert script.stdout is not None
    pids = [int(word) for word in script.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids) and work.is_dir()
    script.kill()
    script.wait()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids) and not work.exists()


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_page_takes_its_figures_from_the_record(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overhead comes of the first stage that has both methods, never of small sizes; without a record it is said so."""
    overhead = modules["gpu_tables"].overhead
    entry = {"step_ms": 100.0, "images_per_s": 1280.0, "mfu": 0.5, "round_step_ms": [100.0]}
    step = {"options": {"batch_size": 128}, "none": {**entry, "time_against_vanilla": 1.0}}
    record = {
        "stages": {
            "step-256": {"status": "done", "figures": {**step, "ahpa": {**entry, "time_against_vanilla": 1.5}}},
            "step-ahpa": {"status": "done", "figures": {**step, "ahpa": {**entry, "time_against_vanilla": 1.04}}},
        }
    }
    assert overhead(record, "ahpa") == 1.04 and overhead(record, "repa") is None
    assert overhead({**record, "small": True}, "ahpa") is None
    page = runpy.run_path(str(BENCHMARKS.parent / "docs/make_tables.py"))
    of_others, names = page["_result"], page["gpu_table"].__globals__
    monkeypatch.setitem(names, "_result", lambda n: None if n == "gpu" else of_others(n))
    assert page["overhead_table"]().count("not yet") == 6 and page["gpu_table"]() == page["NOT_YET"]
    monkeypatch.setitem(names, "_result", lambda n: record if n == "gpu" else of_others(n))
    assert "| `ahpa` | +5 % | +2.3 % | +9.5 % | +4.0 % |" in page["overhead_table"]()
    assert "| `ahpa` | 128 | 100 | 1,280 | 50.0 % | +4.0 % | +5 % | - |" in page["gpu_table"]()
