"""The run: its file, its invariants, its refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from children import Program
from safetensors import safe_open
from safetensors.torch import load_file

import bhfast
from bhfast import tokens
from bhfast.config import TrainConfig
from bhfast.engines.choose import select_engine
from bhfast.errors import ConfigError, StorageError
from bhfast.experiment import is_run_of
from bhfast.trace import open_trace
from bhfast.trace.journal import journal_path
from bhfast.train import TrainResult, main, train
from bhfast.verify import verify

STEPS = 130  # of the run in conftest.py
LAYOUT = {
    "recorded_steps": (torch.int64, [STEPS + 1]),
    "embeddings": (torch.bfloat16, [STEPS + 1, 128, 64]),
    "grads": (torch.bfloat16, [STEPS + 1, 128, 64]),
    "momentum": (torch.bfloat16, [STEPS + 1, 128, 64]),
    "variance": (torch.bfloat16, [STEPS + 1, 128, 64]),
    "logits": (torch.bfloat16, [STEPS + 1, 128]),
    "losses": (torch.bfloat16, [STEPS + 1]),
    "bh_center": (torch.bfloat16, [64]),
    "init_scale": (torch.float32, []),
    "sigma": (torch.float32, []),
    "learning_rate": (torch.float32, []),
    "weight_decay": (torch.float32, []),
    "adam_beta1": (torch.float32, []),
    "adam_beta2": (torch.float32, []),
    "adam_epsilon": (torch.float64, []),
    "token_counts": (torch.int64, [128]),
    "learning_rates": (torch.float64, [STEPS + 1]),
    "clip_coefs": (torch.float32, [STEPS + 1]),
    "grad_norms": (torch.float32, [STEPS + 1]),
}


@pytest.fixture
def settings(text: str, tmp_path: Path) -> TrainConfig:
    """A run of 12 steps."""
    return TrainConfig(steps=12, corpus=text, out=str(tmp_path / "t.safetensors"), device="cpu", quiet=True)


def rerun(settings: TrainConfig, **changes: object) -> TrainResult:
    return train(dataclasses.replace(settings, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_file_has_exactly_the_specified_tensors(run: TrainResult) -> None:
    loaded = load_file(run.path)
    assert {name: (x.dtype, list(x.shape)) for name, x in loaded.items()} == LAYOUT


def test_file_describes_itself(run: TrainResult, text: str) -> None:
    with safe_open(run.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "bhfast-trace"
    assert metadata["format_version"] == "2"
    assert metadata["seed"] == "42"
    assert metadata["engine"] == select_engine("auto", torch.device("cpu"))[0]
    assert metadata["device"] == "cpu"
    assert metadata["adam_rounding"] == "per-op"
    assert metadata["bhfast_version"] == bhfast.__version__
    assert metadata["torch_version"] == torch.__version__
    assert metadata["corpus_sha256"] == tokens.load_corpus(text, vocab_size=128, window=1).sha256
    assert TrainConfig(**json.loads(metadata["config"])) == TrainConfig(steps=STEPS, corpus=text, device="cpu")


def test_file_knows_how_often_each_token_occurs(run: TrainResult, text: str) -> None:
    data = Path(text).read_bytes()
    assert open_trace(run.path)["token_counts"].tolist() == [data.count(token) for token in range(128)]


def test_record_0_is_the_start(run: TrainResult) -> None:
    trace = open_trace(run.path)
    assert torch.equal(trace["embeddings"][0], trace["bh_center"].expand(128, 64))
    for name in ("grads", "momentum", "variance", "logits", "learning_rates", "clip_coefs", "grad_norms"):
        assert (trace[name][0] == 0).all(), name
    assert trace["losses"][0].isnan()
    assert trace.steps.tolist() == list(range(STEPS + 1))


def test_learning_rate_falls_to_zero(run: TrainResult) -> None:
    rates = open_trace(run.path)["learning_rates"]
    assert rates[1:].tolist() == [1e-3 * (1 - (k - 1) / STEPS) for k in range(1, STEPS + 1)]
    constant = TrainConfig(lr_schedule="constant")
    assert constant.learning_rate(1) == constant.learning_rate(9_999) == 1e-3


def test_recorded_gradients_are_unclipped(run: TrainResult) -> None:
    trace = open_trace(run.path)
    norms, coefficients = trace["grad_norms"][1:], trace["clip_coefs"][1:]
    assert (norms > 1).any(), "the run must clip somewhere for this test to mean something"
    assert torch.equal(coefficients, (1 / (norms + 1e-6)).clamp(max=1).bfloat16().float())
    own = trace["grads"][1:].float().flatten(1).norm(dim=1)
    assert (own <= norms * 1.0001).all()


def test_result_agrees_with_the_file(run: TrainResult) -> None:
    trace = open_trace(run.path)
    assert run.steps == STEPS
    assert run.signal is None
    assert run.steps_per_second > 0
    assert torch.equal(run.losses.bfloat16(), trace["losses"][1:])
    assert torch.equal(run.model.wte.weight, trace["embeddings"][-1])


def test_progress_is_told(settings: TrainConfig) -> None:
    heard: list[tuple[int, float]] = []
    result = train(settings, progress=lambda step, loss: heard.append((step, loss)))
    steps = [step for step, _ in heard]
    assert steps == sorted(steps)
    assert steps[0] < 12
    assert math.isnan(heard[0][1])
    assert heard[-1] == (12, result.losses[-1].item())


# ---------------------------------------------------------------------------------------------------------------------
# What a right run shows


def test_first_loss_is_that_of_a_uniform_guess(run: TrainResult) -> None:
    assert run.losses[0].item() == pytest.approx(math.log(128), abs=0.01)


def test_bytes_that_never_occur_stay_one_vector(run: TrainResult, text: str) -> None:
    present = tokens.load_corpus(text, vocab_size=128, window=1).data.unique().long()
    dead = torch.ones(128, dtype=torch.bool)
    dead[present] = False
    vectors = open_trace(run.path)["embeddings"][:, dead].view(torch.int16)
    assert dead.sum() == 49
    assert torch.equal(vectors, vectors[:, :1].expand_as(vectors))
    assert open_trace(run.path)["embeddings"][-1].unique(dim=0).shape[0] > 60


def test_second_moment_never_decreases(run: TrainResult) -> None:
    variance = open_trace(run.path)["variance"]
    assert (variance[1:] >= variance[:-1]).all()


@pytest.mark.parametrize("offset", [1, 2])
def test_loss_falls_below_the_unigram_entropy_of_the_builtin_corpus(offset, settings, text) -> None:
    counts = tokens.load_corpus(text, vocab_size=128, window=1).data.long().bincount().double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum().item()
    result = rerun(settings, steps=700, lr=4e-3, seed=2, record_every=0, target_offset=offset)
    assert result.losses[-100:].mean().item() < entropy


# ---------------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_the_same_run_makes_the_same_file_wherever_it_is(engine, settings: TrainConfig, tmp_path: Path) -> None:
    one = rerun(settings, engine=engine, steps=5)
    time.sleep(1 - time.time() % 1)  # in another second
    other = rerun(settings, engine=engine, steps=5, out=str(tmp_path / "folder" / "other"), storage="memory")
    assert one.path.read_bytes() == other.path.read_bytes()


@pytest.mark.usefixtures("two_threads")
def test_the_metadata_name_the_threads_only_where_bits_depend_on_them(settings: TrainConfig) -> None:
    assert open_trace(rerun(settings, engine="torch").path).metadata["threads"] == "2"
    if select_engine("auto", torch.device("cpu"))[0] == "native":
        metadata = open_trace(rerun(settings, overwrite=True).path).metadata
        assert "threads" not in metadata
        assert metadata["instruction_set"]


def test_another_seed_another_run(settings: TrainConfig, tmp_path: Path) -> None:
    a, b = (rerun(settings, seed=seed, out=str(tmp_path / str(seed))) for seed in (1, 2))
    assert not torch.equal(a.model.wte.weight, b.model.wte.weight)


def test_recording_every_nth_step_records_the_same_bits(settings: TrainConfig, tmp_path: Path) -> None:
    every = open_trace(rerun(settings).path)
    some = open_trace(rerun(settings, record_every=5, out=str(tmp_path / "some")).path)
    assert some.steps.tolist() == [0, 5, 10]
    for name, (_, shape) in LAYOUT.items():
        if shape[:1] == [STEPS + 1]:
            chosen = every[name][::5]
            assert torch.equal(some[name].nan_to_num(), chosen.nan_to_num()), name


def test_recording_does_not_change_the_run(settings: TrainConfig) -> None:
    on, off = rerun(settings), rerun(settings, record_every=0)
    assert off.path is None
    for p, q in zip(on.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("steps", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_the_extension_makes_the_same_file_as_pure_torch(
    steps: int, extension, settings: TrainConfig, tmp_path: Path
) -> None:
    settings = dataclasses.replace(settings, engine="torch", weight_decay=0.1, steps=steps)
    configs = [
        dataclasses.replace(settings, adam_rounding=rounding, out=str(tmp_path / f"pure-{rounding}"))
        for rounding in ("per-op", "opmath")
    ]
    code = f"""if True:
        import sys
        sys.modules["bhfast._C"] = None  # as if it were not built
        from bhfast.ops import backend
        from bhfast.config import TrainConfig
        from bhfast.train import train
        assert backend()[0] == "torch"
        for config in {[dataclasses.asdict(config) for config in configs]!r}:
            train(TrainConfig(**config))
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    for pure in configs:
        compiled = rerun(pure, out=str(tmp_path / f"compiled-{pure.adam_rounding}"))
        assert compiled.path.read_bytes() == pure.path.read_bytes(), pure.adam_rounding


def test_gradient_accumulation_averages_micro_batches(settings: TrainConfig, tmp_path: Path) -> None:
    one = rerun(settings, steps=1, batch_size=4, out=str(tmp_path / "one"))
    four = rerun(settings, steps=1, batch_size=1, grad_accum=4, out=str(tmp_path / "four"))
    assert four.losses.item() == pytest.approx(one.losses.item(), abs=1e-3)
    a, b = (open_trace(r.path)["grads"][1].float() for r in (one, four))
    assert (a - b).norm() < 0.02 * a.norm()
    assert torch.equal(*(open_trace(r.path)["logits"][1] for r in (one, four)))  # of the step's first sequence


@pytest.mark.parametrize("rounding", ["per-op", "opmath"])
def test_other_settings_run(rounding, settings: TrainConfig) -> None:
    result = rerun(
        settings, sigma=1e-2, weight_decay=0.1, max_grad_norm=math.inf, adam_rounding=rounding, hidden_dim=32, heads=4,
        layers=1, context=7, vocab_size=130, batch_size=3,
    )  # fmt: skip
    trace = open_trace(result.path)
    assert list(trace["embeddings"].shape) == [13, 130, 32]
    assert (trace["clip_coefs"][1:] == 1).all()
    assert result.losses.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Bad luck


def test_gradients_that_are_not_finite_are_recorded_and_reported_once(settings, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    result = rerun(settings, lr=1e38, lr_schedule="constant", steps=250, quiet=False)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("note: gradients are not finite since step") == 1
    assert not open_trace(result.path)["grads"][-1].isfinite().all()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_an_interrupted_run_leaves_a_valid_shorter_file(number, code, tmp_path: Path, text: str) -> None:
    out = tmp_path / "t.safetensors"
    arguments = ["--steps", "20000", "--corpus", text, "--device", "cpu", "--out", str(out), "--storage", "stream"]
    process = Program(lambda: main(arguments))
    journal = journal_path(out.with_name(out.name + ".partial"))
    while not (journal.exists() and journal.read_bytes().count(b'"crc32"') > 1):  # until steps are committed
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.send_signal(number)  # an impatient user
    printed, _ = process.communicate()
    assert process.returncode == code
    trace = open_trace(out)
    last = int(trace.steps[-1])
    assert 0 < last < 20_000
    assert trace.steps.tolist() == list(range(last + 1))
    assert f"interrupted by SIG{number.name[3:]} at step {last:,} of 20,000" in printed
    assert f"saved steps 0 to {last:,}" in printed
    assert verify(out).difference is None
    assert not list(tmp_path.glob("*.partial"))


def test_an_exception_in_the_loop_leaves_a_valid_shorter_file(settings: TrainConfig, monkeypatch) -> None:
    from bhfast.engines.torch import TorchEngine

    real = TorchEngine.step

    def failing(self):
        if self.done == 7:
            raise RuntimeError("CUDA error: the cat is on the cable")
        real(self)

    monkeypatch.setattr(TorchEngine, "step", failing)
    with pytest.raises(RuntimeError, match="the cat"):
        rerun(settings, engine="torch")
    assert open_trace(settings.path).steps.tolist() == list(range(8))


def test_same_settings_may_replace_others_may_not(settings: TrainConfig) -> None:
    before = rerun(settings).path.stat().st_ino
    assert rerun(settings).path.stat().st_ino != before
    kept = settings.path.read_bytes()
    with pytest.raises(StorageError, match=r"holds a run with other settings \(seed 42, now 43\); pass overwrite=True"):
        rerun(settings, seed=43)
    with pytest.raises(StorageError, match=r"\(steps 12, now 13; target_offset 2, now 1\)"):
        rerun(settings, steps=13, target_offset=1)
    assert settings.path.read_bytes() == kept
    rerun(settings, seed=43, overwrite=True)
    assert open_trace(settings.path).metadata["seed"] == "43"


def test_knows_a_whole_run_of_the_same_experiment(settings: TrainConfig, tmp_path: Path, text: str) -> None:
    settings = dataclasses.replace(settings, record_every=5)
    path = rerun(settings).path
    assert is_run_of(path, settings)
    assert is_run_of(path, dataclasses.replace(settings, out="elsewhere", storage="stream", overwrite=True))
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text).read_bytes())
    assert is_run_of(path, dataclasses.replace(settings, corpus=str(copy)))
    for change in ({"seed": 43}, {"record_every": 4}, {"sigma": 1e-4}, {"max_grad_norm": math.inf}):
        assert not is_run_of(path, dataclasses.replace(settings, **change)), change
    if select_engine("auto", torch.device("cpu"))[0] == "native":
        assert not is_run_of(path, dataclasses.replace(settings, engine="torch"))
    copy.write_bytes(copy.read_bytes() + b".")
    assert not is_run_of(path, dataclasses.replace(settings, corpus=str(copy)))


def test_knows_what_is_no_whole_run(settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_run_of(settings.path, settings)
    settings.path.write_text("thesis")
    assert not is_run_of(settings.path, settings)
    settings.path.unlink()

    def stop(step: int, loss: float) -> None:
        if step >= 6:
            raise RuntimeError

    for module in ("train", "progress"):
        monkeypatch.setattr(f"bhfast.{module}.PROGRESS_EVERY", 3)  # steps from one look to the next, at most
    with pytest.raises(RuntimeError):
        train(settings, progress=stop)
    assert 6 <= open_trace(settings.path).steps[-1] < 12
    assert not is_run_of(settings.path, settings)


def test_a_file_of_something_else_is_not_replaced(settings: TrainConfig) -> None:
    settings.path.write_text("thesis")
    with pytest.raises(StorageError, match="exists and is not a trace of bhfast; pass overwrite=True to replace it"):
        rerun(settings)
    assert settings.path.read_text() == "thesis"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -1.0}, r"sigma must be finite and at least 0, got -1\.0"),
        ({"sigma": math.nan}, "sigma must be finite and at least 0, got nan"),
        ({"lr": math.inf}, "lr must be finite and at least 0, got inf"),
        ({"beta2": 1.0}, r"beta2 must be at least 0 and below 1, got 1\.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"grad_accum": -1}, "grad_accum must be at least 1, got -1"),
        ({"context": 0}, r"target_offset must be 1 to context \(0\), got 2"),
        ({"context": 0, "target_offset": 0}, r"target_offset must be 1 to context \(0\), got 0"),
        ({"target_offset": 129}, r"target_offset must be 1 to context \(128\), got 129"),
        ({"record_every": -1}, r"record_every must be 0 to steps \(10000\), got -1"),
        ({"steps": 5, "record_every": 6}, r"record_every must be 0 to steps \(5\), got 6"),
        ({"seed": -1}, r"seed must be 0 to 2\^63 - 1, got -1"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be above 0, got 0\.0; inf means no clipping"),
        ({"heads": 3}, "hidden_dim must be divisible by heads, got 64 and 3"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, mps, got 'tpu'"),
        ({"engine": "warp"}, "engine must be one of auto, torch, graph, native, resident, got 'warp'"),
        ({"storage": "cloud"}, "storage must be one of auto, memory, stream, got 'cloud'"),
        ({"lr_schedule": "cosine"}, "lr_schedule must be one of linear, constant, got 'cosine'"),
        ({"adam_rounding": "up"}, "adam_rounding must be one of per-op, opmath, got 'up'"),
    ],
    ids=str,
)
def test_refuses_bad_settings(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test asks for in vain")
def test_refuses_a_device_that_is_not_there(settings: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="device cuda is not available here; use --device"):
        rerun(settings, device="cuda")


def test_program_prints_one_line_and_no_traceback(tmp_path: Path, text: str, capsys) -> None:
    assert main(["--sigma", "-1"]) == 2
    assert capsys.readouterr().err == "bhfast train: error: sigma must be finite and at least 0, got -1.0\n"
    with pytest.raises(SystemExit):
        main(["--steps", "x"])
    assert "invalid int value: 'x'" in capsys.readouterr().err
    assert main(["--steps", "3", "--corpus", text, "--out", str(tmp_path / "t")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "largest pairwise distance 0.000000" in printed.out
    assert main(["--corpus", str(tmp_path / "gone")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bhfast train: error: cannot read the corpus")
    assert said.count("\n") == 1


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path, text: str) -> None:
    out = tmp_path / "t"
    process = Program(lambda: main(["--steps", "30", "--corpus", text, "--out", str(out)]))
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)
    assert open_trace(out).steps[-1] == 30


def test_quiet_prints_nothing(settings: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "2", "--quiet", "--corpus", settings.corpus, "--out", settings.out]) == 0
    assert capsys.readouterr() == ("", "")


def test_default_file_has_the_notebook_name() -> None:
    folder = Path("tensors/Lil_Gatsby")
    assert TrainConfig().path == folder / "1.12b_training_data_sigma0e+00.safetensors"
    assert TrainConfig(sigma=1e-4).path == folder / "1.12b_training_data_sigma1e-04.safetensors"


def test_the_module_is_callable(settings: TrainConfig) -> None:
    """As ``bhfast.train(config)``, also after ``import bhfast.train``, which binds the module to that name."""
    assert bhfast.train(dataclasses.replace(settings, steps=2)).steps == 2
    assert bhfast.train.TrainConfig is bhfast.TrainConfig is TrainConfig
