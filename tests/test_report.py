"""The figures, the survey and the page, against slow and obvious computations."""

from __future__ import annotations

import base64
import builtins
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from traces import record, rewrite

from bhfast import lattice
from bhfast.config import TrainConfig
from bhfast.recording.recorder import Recorder
from bhfast.report import main
from bhfast.report.survey import Survey, left_out, survey_trace
from bhfast.report.sweep import survey_sweep
from bhfast.summary import final_loss, verification_figures, window_means
from bhfast.trace import open_trace
from bhfast.trace.checksums import without_checksums
from bhfast.train import TrainResult, train


def test_losses_are_averaged_by_thousands() -> None:
    steps = torch.arange(500, 2501, 500)
    assert window_means(steps, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])) == [2.0, 6.0, 9.0]


def test_final_loss_is_of_the_last_thousand_steps() -> None:
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]).bfloat16()
    assert final_loss(torch.arange(500, 2501, 500), losses) == 8.0  # of steps 2,000 and 2,500; 1,500 is too long ago
    assert final_loss(torch.arange(1, 6), losses) == 5.0


def test_figures_of_a_run(run: TrainResult) -> None:
    trace = open_trace(run.path)
    lines = verification_figures(trace).splitlines()
    centroid = trace["embeddings"][-1].float().mean(0).norm().item()
    assert lines[0].endswith("largest pairwise distance 0.000000")
    assert lines[1].startswith(f"step 130: centroid norm {centroid:.6f}")
    assert lines[2].startswith("step 1: row norm of the gradient, mean ")
    assert lines[3].startswith(f"step 100: mean |momentum| {trace['momentum'][100].float().abs().mean().item():.6e}")
    assert (
        lines[4]
        == f"loss: {run.losses[0].bfloat16().item():.4f} at step 1, {trace['losses'][-1].item():.4f} at step 130"
    )
    assert lines[5] == f"mean loss of each 1,000 steps: {trace['losses'][1:].double().mean().item():.3f}"


def test_program(run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.path)]) == 0
    assert "largest pairwise distance" in capsys.readouterr().out
    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    assert main([str(tmp_path / "foreign")]) == 2
    assert "cannot be reported: it has no recorded_steps" in capsys.readouterr().err


def test_of_several_files(run: TrainResult, tmp_path: Path) -> None:
    whole = open_trace(run.path)
    names = ("embeddings", "grads", "momentum", "variance")
    first = {name: x[...].as_subclass(torch.Tensor) for name, x in whole.items()}
    second = {name: first[name][:, 50:].contiguous() for name in names} | {"recorded_steps": first["recorded_steps"]}
    first |= {name: first[name][:, :50].contiguous() for name in names}
    for file, tensors in (("a", first), ("b", second)):
        save_file(tensors, tmp_path / file, without_checksums(whole.metadata))
    shards = {
        name: {
            "shape": list(whole[name].shape),
            "parts": [
                {"file": "a", "offset": [0, 0, 0], "shape": list(first[name].shape)},
                {"file": "b", "offset": [0, 50, 0], "shape": list(second[name].shape)},
            ],
        }
        for name in names
    }
    path = tmp_path / "run.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(first, "a"), "shards": shards}))
    of_files, of_one = (survey_trace(open_trace(file)) for file in (path, run.path))
    assert verification_figures(of_files.trace) == verification_figures(of_one.trace)
    assert (of_files.summary(), of_files.table()) == (of_one.summary(), of_one.table())


# ---------------------------------------------------------------------------------------------------------------------
# The survey


@pytest.fixture(scope="module")
def found(run: TrainResult) -> Survey:
    return survey_trace(open_trace(run.path))


def test_trained_and_dead_tokens(found: Survey) -> None:
    counts = found.trace["token_counts"]
    assert counts.sum() > 1000
    assert torch.equal(found.groups["trained"], counts > 0)
    assert torch.equal(found.groups["dead"], counts == 0)
    assert (found.distinct["dead"] == 1).all()  # at σ = 0


def test_survey_of_every_record(found: Survey) -> None:
    w, g = found.trace["embeddings"], found.trace["grads"]
    for name, group in {"all": torch.ones(128, dtype=torch.bool), **found.groups}.items():
        assert found.distinct[name].tolist() == [len({tuple(v) for v in record[group].tolist()}) for record in w]
    for k, (before, after) in enumerate(itertools.pairwise(w)):
        sizes = torch.stack(lattice.norms(lattice.displacement(before, after)), 1)
        assert torch.equal(found.median_displacements["trained"][k], sizes[found.groups["trained"]].median(0).values)
    spread = [(x.double() - x.double().mean(0)).square().mean().item() for x in g]
    torch.testing.assert_close(found.gradient_temperature, torch.tensor(spread, dtype=torch.float64))
    moved = w[1:].double() - w[:-1].double()
    spread = [(x - x.mean(0)).square().mean().item() for x in moved]
    torch.testing.assert_close(found.temperatures.thermal / 64, torch.tensor(spread, dtype=torch.float64))
    for name in ("grads", "momentum", "variance"):
        wanted = [x.double().square().sum().sqrt().item() for x in found.trace[name]]
        torch.testing.assert_close(found.norms[name], torch.tensor(wanted, dtype=torch.float64))
    for name, group in found.groups.items():
        sizes = lattice.norms(lattice.displacement(w[:-1], w[1:])[:, group])
        shares = [sizes.l2 > 1000, (sizes.l2 <= 1000) & (sizes.l1 > 1), (sizes.l1 <= 1) & (sizes.l1 > 0), sizes.l1 == 0]
        assert torch.equal(found.phases[name], torch.stack([x.double().mean(1) for x in shares], 1))
        speeds = moved[:, group]
        rho = [(speeds[: len(speeds) - k] * speeds[k:]).sum() / speeds.square().sum() for k in (0, 1, 100)]
        torch.testing.assert_close(found.correlation[name][[0, 1, 100]], torch.stack(rho))
    assert torch.equal(found.shape_records, torch.arange(131))
    assert found.effective_dimensions[0].isnan()  # all at one point
    values = torch.linalg.eigvalsh(torch.cov(w[-1].double().T))
    assert found.effective_dimensions[-1].item() == pytest.approx((values.sum() ** 2 / values.square().sum()).item())
    assert found.entropies[0] == 0
    assert torch.equal(found.radius_records, torch.arange(131))
    assert torch.equal(found.distance_records[[0, -1]], torch.tensor([0, 130]))
    last = w[-1].double()
    apart = torch.stack([(last - v).norm(dim=1) for v in last])
    assert found.largest_distances[-1].item() == pytest.approx(apart.max().item(), rel=1e-6)
    assert found.mean_distances[-1].item() == pytest.approx(apart.sum().item() / (128 * 127), rel=1e-6)
    torch.testing.assert_close(found.radii[-1], (last - last.mean(0)).norm(dim=1))
    assert found.centroid_norms[0].item() == pytest.approx(found.trace["bh_center"].double().norm().item(), rel=1e-6)


def test_the_cloud_is_seen_along_its_longest_axes(found: Survey) -> None:
    assert [shot.step for shot in found.snapshots] == [0, 1, 2, 10, 100, 130]
    assert found.snapshots[0].projection.abs().max() == 0
    last = found.trace["embeddings"][-1].double()
    variances = torch.linalg.eigvalsh(torch.cov(last.T)).flip(0)
    torch.testing.assert_close(found.snapshots[-1].projection.var(0), variances[:2])


def test_results(found: Survey, run: TrainResult) -> None:
    results = found.results()
    assert results["mean loss of the last 1,000 steps"] == pytest.approx(run.losses.mean().item(), rel=1e-2)
    assert results["tokens in the black hole"] >= results["dead tokens"]
    assert results["dead tokens, distinct vectors"] == 1
    still = found.trace["embeddings"][-1] == found.trace["embeddings"][-2]
    assert (results["dead tokens, all frozen since step"] is None) == (not still[found.groups["dead"]].all())
    assert results["trained tokens, frozen"] == int(still.all(1)[found.groups["trained"]].sum())


def test_frozen_tokens_have_a_step(found: Survey) -> None:
    last_moves = torch.where(found.groups["dead"], 77, 130)
    stopped = replace(found, life=found.life._replace(last_late_step=last_moves))
    assert (stopped.freeze_step("dead"), stopped.freeze_step("trained")) == (77, None)


def test_headline(found: Survey) -> None:
    dead = found.groups["dead"]
    count = int(dead.sum())

    def headline(*last_moves: int) -> str:
        """The headline if the dead tokens moved last in these steps, the trained ones in step 130."""
        last_late = torch.full_like(found.life.last_late_step, 130)
        last_late[dead] = torch.tensor(last_moves * count)[:count]
        first, _, second = replace(found, life=found.life._replace(last_late_step=last_late)).headline().partition("; ")
        assert second == f"{128 - count} trained tokens still moved in the last step, 130"
        return first

    assert headline(7, 77) == f"{count} dead tokens froze by step 77"
    assert headline(0) == f"{count} dead tokens never moved"
    assert headline(0, 130) == f"{(count + 1) // 2} of {count} dead tokens froze before the last step, 130"


def test_many_records_are_thinned_towards_the_end() -> None:
    from bhfast.report.survey import log_spaced

    some = log_spaced(10_001, 1000)
    assert some[:20].tolist() == list(range(20))
    assert some[-1] == 10_000
    assert len(some) <= 1000
    assert (some.diff() > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def settings(text: str) -> TrainConfig:
    return TrainConfig(corpus=text, device="cpu", quiet=True)


@pytest.fixture
def matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the report extra: matplotlib")
    monkeypatch.setattr("bhfast.report.page.DPI", 20)  # most of the time goes into pixels


def check_page(folder: Path) -> str:
    """Whether the page has every picture of the folder inside, and needs nothing else; return it without them."""
    html = (folder / "index.html").read_text(encoding="utf-8")
    inside = [base64.b64decode(x) for x in re.findall('src="data:image/png;base64,([^"]+)"', html)]
    assert sorted(inside) == sorted(p.read_bytes() for p in folder.glob("*.png"))
    html = re.sub('src="data:[^"]+"', "", html)
    assert not re.search(r"https?://|src=|href=", html)
    return html


@pytest.mark.usefixtures("matplotlib")
def test_page_of_a_run(run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.path), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "new" / "folder" / "index.html")
    html = check_page(tmp_path / "new" / "folder")
    assert len(list((tmp_path / "new" / "folder").glob("*.png"))) == 12
    assert "130 steps on" in html
    dead = int((open_trace(run.path)["token_counts"] == 0).sum())
    assert html.count(f"All {dead} dead tokens are one vector in every record") == 8  # text and alternative text
    assert "largest pairwise distance" in html


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("steps", [1, 2])
def test_page_of_a_short_run(steps: int, tmp_path: Path, settings: TrainConfig) -> None:
    config = replace(settings, steps=steps, out=str(tmp_path / "<b>.safetensors"))
    assert main([str(train(config).path), "--out", str(tmp_path)]) == 0
    assert "<p>bhfast: &lt;b&gt;.safetensors</p>" in check_page(tmp_path)


@pytest.mark.usefixtures("matplotlib")
def test_ticks_of_a_scale_in_steps() -> None:
    from bhfast.report.pictures import escape_ticks

    assert escape_ticks(0, 2473) == [0, 1, 10, 100, 1000, 2473]
    assert escape_ticks(3, 40) == [3, 5, 10, 20, 40]
    assert escape_ticks(0, 1) == [0, 1]
    assert escape_ticks(7, 7) == [7]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, settings: TrainConfig) -> Path:
    """The file of a sweep of which one run failed."""
    folder = tmp_path_factory.mktemp("sweep")
    runs = []
    for lr, sigma, seed in itertools.product([1e-3, 1e-2], [0.0, 1e-4, 1e-2], [1, 2]):
        name = f"sigma{sigma:g}_seed{seed}_lr{lr:g}"
        train(replace(settings, lr=lr, sigma=sigma, seed=seed, steps=20, out=str(folder / f"{name}.safetensors")))
        varied = {"sigma": sigma, "seed": seed, "lr": lr}
        runs.append({"name": name, "file": f"{name}.safetensors", "settings": varied, "state": "done", "error": None})
    runs[-1].update(state="failed", error="it was <late>")
    grid = {"sigma": [0.0, 1e-4, 1e-2], "seed": [1, 2], "lr": [1e-3, 1e-2]}
    file = folder / "sweep.json"
    file.write_text(json.dumps({"format": "bhfast-sweep", "version": 1, "grid": grid, "runs": runs}))
    return file


@pytest.mark.usefixtures("matplotlib")
def test_page_of_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep), "--out", str(sweep.parent / "out")]) == 0
    html = check_page(sweep.parent / "out")
    assert html.count("<tr>") == 13
    assert "failed: it was &lt;late&gt;" in html
    assert "failed: it was <late>" in capsys.readouterr().out
    assert (sweep.parent / "out" / "mean-radius.png").exists()
    assert not (sweep.parent / "out" / "dead-tokens.png").exists()  # as many in all runs


def test_sweep_by_series(sweep: Path) -> None:
    found = survey_sweep(sweep)
    assert found.axis == "sigma"
    assert {name: len(runs) for name, runs in found.series().items()} == {"lr 0.001": 6, "lr 0.01": 5}
    wanted = survey_trace(open_trace(sweep.parent / "sigma0_seed2_lr0.001.safetensors")).results()
    assert next(run for run in found.runs if run.name == "sigma0_seed2_lr0.001").results == wanted
    assert replace(found, grid={"sigma": [0], "seed": [1, 2], "lr": [1, 2]}).axis == "lr"


def test_what_cannot_be_reported(run: TrainResult, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*arguments: object) -> str:
        assert main([str(x) for x in arguments]) == 2
        return capsys.readouterr().err

    assert "cannot open the sweep" in error(tmp_path / "sweep.json")
    (tmp_path / "sweep.json").write_text("[1]")
    assert "is not the sweep.json of a sweep" in error(tmp_path / "sweep.json")
    (tmp_path / "sweep.json").write_text('{"format": "bhfast-sweep", "runs": [{}]}')
    assert "is not the sweep.json of a sweep" in error(tmp_path / "sweep.json")
    (tmp_path / "file").touch()

    def without(name: str, *arguments: object, then=builtins.__import__) -> object:
        if name.startswith("matplotlib"):
            raise ImportError
        return then(name, *arguments)

    for module in ("bhfast.report.pictures", "bhfast.report.page"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        assert "pictures need matplotlib: pip install matplotlib" in error(run.path, "--out", tmp_path / "out")
    pytest.importorskip("matplotlib", reason="pictures need the report extra: matplotlib")
    assert "cannot write the report to" in error(run.path, "--out", tmp_path / "file" / "folder")


# ---------------------------------------------------------------------------------------------------------------------
# Other traces


def walk(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Vectors ``[7, 5, 4]`` that move."""
    return torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)).cumsum(0).to(dtype)


def reported(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], set[str]]:
    """Return the lines of a report, and the names of the pictures it would have."""
    from bhfast.report.pictures import run_pictures

    status = main([str(path)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out.splitlines(), {picture.name for picture in run_pictures(survey_trace(open_trace(path)))}


WITHOUT_FIELDS = {"cloud", "displacement", "distance", "distinct", "freezing", "motion", "phases", "shape", "spacetime"}


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_trace_of_vectors_alone(dtype: torch.dtype, tmp_path: Path, capsys) -> None:
    save_file({"recorded_steps": torch.arange(0, 70, 10), "W": walk(dtype)}, tmp_path / "t")
    lines, pictures = reported(tmp_path / "t", capsys)
    assert lines[2:] == [
        "left out: loss: losses or loss is not in the file",
        "left out: norms: neither gradients nor moments were recorded",
        "left out: temperature of the gradient: gradients were not recorded",
        "left out: trained and dead tokens apart: token_counts is not in the file",
    ]
    assert pictures == WITHOUT_FIELDS
    if dtype == torch.float32:
        assert main([str(tmp_path / "t"), "--out", str(tmp_path / "out")]) == 0
        check_page(tmp_path / "out")


@pytest.mark.usefixtures("matplotlib")
def test_a_trace_of_sgd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "t", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))  # w has rows, b is a vector
    lines, pictures = reported(tmp_path / "t", capsys)
    assert lines[2].startswith("step 1: row norm of the gradient, mean ")
    assert lines[3] == "loss: 0.0000 at step 1, 0.7143 at step 6"
    assert lines[5:] == ["left out: trained and dead tokens apart: token_counts is not in the file"]
    assert pictures == {*WITHOUT_FIELDS, "loss", "norms", "temperature"}
    survey = survey_trace(open_trace(tmp_path / "t"))
    assert survey.norms.keys() == {"w.grad", "w.momentum_buffer"}


def test_token_counts_of_recorded_rows(tmp_path: Path) -> None:
    """``token_counts`` has the whole vocabulary, or as many tokens as are recorded."""
    wte = nn.Parameter(torch.randn(20, 4).bfloat16())
    optimizer = torch.optim.SGD([wte], lr=0.1)
    counts = torch.arange(20) % 3
    with Recorder(optimizer, {"wte": wte}, steps=2, path=tmp_path / "t", rows={"wte": [1, 3, 6, 19]}) as recorder:
        for _ in range(2):
            wte.grad = torch.ones_like(wte)
            optimizer.step()
            recorder.log()
    tensors = dict(open_trace(tmp_path / "t"))
    metadata = open_trace(tmp_path / "t").metadata
    rewrite(tmp_path / "whole", {**tensors, "token_counts": counts}, metadata)
    found = survey_trace(open_trace(tmp_path / "whole"))
    assert found.groups["dead"].tolist() == [False, True, True, False]
    rewrite(tmp_path / "rows", {**tensors, "token_counts": torch.tensor([4, 0, 0, 0])}, metadata)
    assert survey_trace(open_trace(tmp_path / "rows")).groups["trained"].tolist() == [True, False, False, False]
    rewrite(tmp_path / "neither", {**tensors, "token_counts": torch.arange(7)}, metadata)
    found = survey_trace(open_trace(tmp_path / "neither"))
    assert found.groups.keys() == {"all"}
    (line,) = [line for line in left_out(found.found) if "apart" in line]
    assert line == "left out: trained and dead tokens apart: token_counts has 7 values for 4 vectors"


def test_one_of_several_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*options: str) -> str:
        assert main([str(tmp_path / "t"), *options]) == 2
        return capsys.readouterr().err.partition(str(tmp_path / "t"))[2]

    two = {
        "recorded_steps": torch.arange(7),
        "a": walk(),
        "b": walk() + 1,
        "a.grad": walk(),
        "b.m": walk()[:, :, :2].contiguous(),
    }
    save_file({**two, "losses": torch.ones(6)}, tmp_path / "t")
    assert error() == " has vectors of a, b: choose with --params\n"
    assert error("--params", "c") == " cannot be reported: it has no parameter c; it has a, b\n"
    assert main([str(tmp_path / "t"), "--params", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left out: norm of m: b.m must be of floating-point numbers [7, 5, 4], got torch.bfloat16 [7, 5, 2]" in lines
    assert any(
        line.startswith("left out: loss: losses or loss must be of floating-point numbers [7], got") for line in lines
    )
    save_file({"recorded_steps": torch.arange(7), "W": walk().double()}, tmp_path / "t")
    assert error() == (
        " cannot be reported: it has no vectors: no tensor of records x vectors x dimensions; it has no parameters\n"
    )
    save_file({"recorded_steps": torch.arange(7), "embeddings": walk().double()}, tmp_path / "t")
    assert error().startswith(" cannot be reported: embeddings must be bfloat16 or float16 or float32 [7, at least 1, ")
    save_file({"recorded_steps": torch.arange(7, 0, -1), "W": walk()}, tmp_path / "t")
    assert error() == " cannot be reported: recorded_steps must increase, from 0 or later\n"
