"""The player in a browser, with traces of all kinds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Chromium, find_chromium
from safetensors.torch import save_file
from streaming_run import ROWS
from streaming_run import record as stream
from torch import nn
from traces import record as record_small
from traces import saved, shard, walk

from bhfast import lattice
from bhfast.recording.recorder import Recorder
from bhfast.report import main
from bhfast.report import player as module
from bhfast.report.embed import SCRIPTS, player_html
from bhfast.report.names import token_names
from bhfast.report.player import player_data
from bhfast.summary import find_vectors
from bhfast.trace import open_trace
from bhfast.train import TrainResult

# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def test_scripts_are_strict() -> None:
    scripts = player_html(None).split("<script>\n")[1:]
    assert len(scripts) == len(SCRIPTS) == len([*Path(module.__file__).with_name("web").glob("*.js")])
    assert all(script.startswith('"use strict";') and script.count("</script") == 1 for script in scripts)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("this machine has no Chromium")
    browser = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(started: Chromium) -> Iterator[Chromium]:
    """A browser whose page must not complain, nor ask for anything."""
    pytest.importorskip("matplotlib", reason="reports need the report extra: matplotlib")
    started.resize(1000, 800)
    yield started
    started.evaluate("0")  # so that it has reported all
    assert (started.problems, started.requests) == ([], [])


def report(path: Path, folder: Path, *options: str) -> Path:
    """Write the report of a trace, without its pictures; return the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bhfast.report.pictures.run_pictures", lambda survey: [])
        assert main([str(path), "--out", str(folder / "report"), *options]) == 0
    return folder / "report" / "index.html"


def show(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.wait("player.data !== null && player.slider.hasAttribute('aria-valuetext')")


@pytest.fixture(scope="module")
def page_of_run(run: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(run.path, tmp_path_factory.mktemp("run"))


@pytest.fixture
def page(browser: Chromium, page_of_run: Path) -> Chromium:
    """A browser that shows the short run."""
    show(browser, page_of_run)
    return browser


def place_of(browser: Chromium, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """A place in the window: at that share of an element's width and height."""
    box = browser.evaluate(
        f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))"
        f"(document.querySelector({selector!r}))"
    )
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def click(browser: Chromium, selector: str, x: float = 0.5, y: float = 0.5) -> None:
    at = place_of(browser, selector, x, y)
    browser.mouse("Moved", *at)
    browser.mouse("Pressed", *at, buttons=1)
    browser.mouse("Released", *at)


READOUT = "document.querySelector('.readout').textContent"
DETAILS = "document.querySelector('.details').innerText"


def settled(browser: Chromium, expression: str) -> Any:
    """The value of an expression after all that was to be drawn is drawn."""
    return browser.evaluate(f"new Promise(done => requestAnimationFrame(() => setTimeout(() => done({expression}))))")


def test_positions_on_the_screen(page: Chromium, run: TrainResult) -> None:
    """Where tokens are, at a step and under a camera, is where numpy says; the pointer finds them there."""
    place_of(page, ".stage canvas")
    page.evaluate("player.seekStep(97); player.cloud.yaw = 0.7; player.cloud.pitch = -0.4; player.redraw()")
    width, height, found = settled(
        page,
        "[player.canvas.clientWidth, player.canvas.clientHeight, "
        "[...player.cloud.x].map((x, i) => [x, player.cloud.y[i]])]",
    )
    w = open_trace(run.path)["embeddings"].double().numpy()
    axes = np.linalg.svd(w[-1] - w[-1].mean(0), full_matrices=False)[2][:3]
    axes *= np.sign(axes.sum(1))[:, None]
    clouds = (w - w.mean(1, keepdims=True)) @ axes.T  # [R, V, 3]
    yaw, pitch = 0.7, -0.4
    about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    right, up, near = about_x @ about_y @ clouds[97].T
    reach = abs(clouds).max()
    pixels = 0.46 * min(width, height) / reach * 4 / (4 - near / reach)
    wanted = np.stack([width / 2 + right * pixels, height / 2 - up * pixels], 1)
    np.testing.assert_allclose(found, wanted, atol=0.05)
    left, top = place_of(page, ".stage canvas", 0, 0)
    alone = max(range(128), key=lambda i: np.sort(np.linalg.norm(wanted - wanted[i], axis=1))[1])
    page.mouse("Moved", left + wanted[alone, 0] + 3, top + wanted[alone, 1])
    tip = settled(page, "document.querySelector('.tip').innerText")
    assert tip.splitlines()[0] == token_names(find_vectors(open_trace(run.path)))[alone]


def test_plays_and_scrubs(page: Chromium) -> None:
    assert settled(page, READOUT) == "step 130"
    page.evaluate("player.scale.value = 'step'; player.changed(); player.speed.value = 4")
    click(page, ".bar button")
    page.wait("player.moment > 3")
    page.evaluate("player.canvas.focus()")
    page.press(" ")
    assert settled(page, "[player.isPlaying, player.moment % 1]") == [False, 0]
    click(page, ".bar input", 0.5)
    assert abs(int(settled(page, READOUT).removeprefix("step ")) - 65) <= 1
    page.press("Home")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.press(key)
    assert settled(page, READOUT) == "step 2"
    page.press("End")
    assert settled(page, READOUT) == "step 130"
    click(page, ".diagrams figure:nth-child(2) canvas", 0.5)  # radii
    assert 50 < int(settled(page, READOUT).removeprefix("step ")) < 75
    before = settled(page, "player.cloud.yaw")
    page.evaluate("player.canvas.focus()")
    page.press("ArrowRight", shift=True)
    assert settled(page, "player.cloud.yaw") > before


def test_finds_a_token(page: Chromium, run: TrainResult) -> None:
    trace = open_trace(run.path)
    dead = (trace["token_counts"] == 0).nonzero()[:, 0].tolist()
    page.evaluate("player.seekStep(120); player.search.focus()")
    page.press("e")
    details = settled(page, DETAILS)
    life = lattice.life(trace["embeddings"], trace.steps)
    moved = lattice.norms(lattice.displacement(trace["embeddings"][119], trace["embeddings"][120])).l2[101]
    norm = trace["embeddings"][120][101].double().norm()
    assert details.startswith("e")
    assert "row 101, trained" in details
    assert f"norm {norm:.3g}," in details
    assert (f"moved {moved.bfloat16().item():.3g} ulp" if moved else "did not move") in details
    for token in (int(life.last_late_step.argmin()), int(life.last_late_step.argmax())):
        last = int(life.last_late_step[token])
        page.evaluate(f"player.select({token})")
        wanted = f"frozen after step {last}" if last < 130 else "still moved in the last step"
        assert wanted in settled(page, DETAILS)
    page.evaluate(f"player.search.value = '{dead[1]}'")
    page.press("Enter")
    page.evaluate(f"player.select({dead[1]})")
    assert f"one vector with {len(dead) - 1} others" in settled(page, DETAILS)
    assert settled(page, f"[player.cloud.counts[{dead[0]}], player.cloud.counts[{dead[1]}]]") == [len(dead), 0]
    page.evaluate("player.search.value = 'no such token'; player.searchFor(0)")
    assert settled(page, "document.querySelector('.found').textContent") == "not found"


def test_a_black_hole_has_the_color_of_most(browser: Chromium, tmp_path: Path) -> None:
    vectors = walk(3, 5, 4)
    vectors[:, 1] = vectors[:, 2] = vectors[:, 0]
    saved(tmp_path / "t", vectors, token_counts=torch.tensor([9, 0, 0, 4, 0]))
    show(browser, report(tmp_path / "t", tmp_path))
    assert settled(browser, "[[...player.paint.numbers(1)], [...player.cloud.counts]]") == [
        [1, 1, 1, 0, 1],
        [3, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_fits_a_phone(page: Chromium, dark: bool) -> None:
    page.resize(390, 844, dark=dark)
    assert settled(page, "document.documentElement.scrollWidth") == 390
    background = settled(page, "getComputedStyle(player.stage).backgroundColor")
    assert (background == "rgb(13, 13, 20)") == dark
    sizes = settled(page, "[...document.querySelectorAll('.player canvas')].map(c => [c.clientWidth, c.width])")
    assert len(sizes) == 5
    assert all(250 < width <= 390 and pixels >= width for width, pixels in sizes)


def test_newer_data_keeps_the_view(page: Chromium, run: TrainResult) -> None:
    found = find_vectors(open_trace(run.path))
    shorter = replace(found, steps=found.steps[:20], vectors=found.vectors[:20, :, :4], losses=None)
    packed = player_data(shorter, token_names(found)).pack().hex()
    page.evaluate("player.seekStep(10); player.select(7); player.cloud.turn(1, 0)")
    load_it = f"player.load(Uint8Array.from('{packed}'.match(/../g), x => parseInt(x, 16)))"
    page.evaluate(f"{load_it}.then(() => 0)")
    state = "[player.frame, player.selected, player.cloud.yaw, player.data.frames, player.plots[0].figure.hidden]"
    assert settled(page, state) == [10, 7, 1.5, 20, True]
    page.evaluate("player.seek(19)")
    page.evaluate("player.load(Uint8Array.from(atob(embedded.textContent), c => c.charCodeAt(0))).then(() => 0)")
    assert settled(page, state) == [130, 7, 1.5, 131, False]  # it was at the end, and follows it


# ---------------------------------------------------------------------------------------------------------------------
# Reports of any trace


def test_a_hostile_trace(browser: Chromium, tmp_path: Path) -> None:
    """Whatever names and metadata hold is text."""
    evil = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>\u2028\ud800"
    metadata = {"token_strings": json.dumps([evil] * 5), "engine": evil.replace("\ud800", ""), "corpus": "<b>"}
    keys = {"param": evil[:-1], "grad": f"{evil[:-1]}.grad"}
    metadata |= {"optimizer": json.dumps({"params": {evil: {"keys": keys}}}), "config": json.dumps({"lr": evil})}
    tensors = {"recorded_steps": torch.arange(4), evil[:-1]: walk(4, 5, 3), f"{evil[:-1]}.grad": walk(4, 5, 3)}
    save_file(tensors, tmp_path / "t", metadata)
    trace = (tmp_path / "t").rename(tmp_path / os.fsdecode(b"a&<b>\xff"))  # not UTF-8
    (tmp_path / "names").write_text("\n".join([evil[:-2]] * 5))
    for options in ([], ["--tokens", str(tmp_path / "names")], ["--params", evil[:-1]]):
        show(browser, report(trace, tmp_path, *options))
        browser.evaluate("player.select(1); player.hover(player.cloud.x[0], player.cloud.y[0])")
        assert evil[:20] in settled(browser, DETAILS)
        assert settled(browser, "[typeof hacked, document.images.length]") == ["undefined", 0]
        assert browser.evaluate("document.title").startswith("bhfast: a&<b>")


def recorded_rows(path: Path) -> None:
    """Write a float32 trace of some rows of a matrix, of a kernel with four axes, and of a vector."""
    torch.manual_seed(0)
    shapes = {"wte": (20, 4), "conv": (3, 2, 2, 2), "bias": (6,)}
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=0.01)
    with Recorder(optimizer, params, steps=8, path=path, rows={"wte": [1, 3, 6, 19]}) as recorder:
        for _ in range(8):
            for param in params.values():
                param.grad = torch.randn_like(param)
            optimizer.step()
            recorder.log(loss=1.0)


@pytest.mark.parametrize(
    ("param", "tokens", "dim", "first"), [("wte", 4, 4, "row 1"), ("conv", 3, 8, "row 0"), ("bias", 6, 1, "row 0")]
)
def test_any_parameter(browser: Chromium, tmp_path: Path, param: str, tokens: int, dim: int, first: str) -> None:
    recorded_rows(tmp_path / "t")
    show(browser, report(tmp_path / "t", tmp_path, "--params", param))
    found = settled(browser, "[player.data.tokens, player.data.dim, player.data.info.names[0], player.data.info.dtype]")
    assert found == [tokens, dim, first, "float32"]


def test_several_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the report extra: matplotlib")
    monkeypatch.setattr("bhfast.report.pictures.run_pictures", lambda survey: [])
    recorded_rows(tmp_path / "t")
    assert main([str(tmp_path / "t"), "--params", "conv", "bias", "--out", str(tmp_path / "out")]) == 0
    assert "bhfast: t, conv" in (tmp_path / "out" / "conv" / "index.html").read_text()
    assert (tmp_path / "out" / "bias" / "index.html").exists()


def test_of_several_files(browser: Chromium, tmp_path: Path) -> None:
    record_small(tmp_path / "t.safetensors")
    show(browser, report(shard(tmp_path / "t.safetensors"), tmp_path))
    assert settled(browser, "[player.data.tokens, player.data.frames]") == [5, 7]


def test_compact(browser: Chromium, tmp_path: Path) -> None:
    record_small(tmp_path / "t.safetensors", keyframes=4)
    assert "w" in open_trace(tmp_path / "t.safetensors").rebuilt
    show(browser, report(tmp_path / "t.safetensors", tmp_path))
    assert settled(browser, "[player.data.tokens, player.data.frames]") == [5, 7]


def test_the_notebooks_file(browser: Chromium, run: TrainResult, tmp_path: Path) -> None:
    trace = open_trace(run.path)
    names = ("recorded_steps", "embeddings", "grads", "momentum", "variance", "logits", "losses", "bh_center", "sigma")
    save_file({name: trace[name].as_subclass(torch.Tensor).clone() for name in names}, tmp_path / "t")
    show(browser, report(tmp_path / "t", tmp_path))
    browser.evaluate("player.select(101)")
    assert settled(browser, DETAILS).startswith("e")
    assert "trained and dead tokens apart" in settled(browser, "player.notes.textContent")


def test_a_run_that_goes_on(browser: Chromium, tmp_path: Path) -> None:
    def look(step: int, recorder: Recorder) -> None:
        if step == 60:
            while recorder.stats().committed < 30:
                time.sleep(0.001)
            show(browser, report(tmp_path / "t.partial", tmp_path, "--params", "second"))
            live, tokens, frames = settled(
                browser, "[player.data.info.is_live, player.data.tokens, player.data.frames]"
            )
            assert (live, tokens) == (True, len(ROWS))
            assert 30 <= frames <= 61

    stream(tmp_path / "t", 60, commit_seconds=0.0, after_step=look)
