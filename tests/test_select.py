"""Which parameters and rows are recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bhfast.errors import ConfigError
from bhfast.recording.recorder import Recorder
from bhfast.recording.selection import select
from bhfast.trace import open_trace


class Tied(nn.Module):
    """Two layers, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


NAMES = ["wte.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "head.weight"]


def names_of(params, model: nn.Module | None = None, /, **options) -> list[str]:
    model = Tied() if model is None else model
    arguments = {"model": model, "optimizers": [torch.optim.SGD(model.parameters(), lr=0.1)], "rows": {}, **options}
    selections, _ = select(params, **arguments)
    return [selection.name for selection in selections]


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ("wte.weight", ["wte.weight"]),
        (["layers.1.weight", "layers.0.bias"], ["layers.0.bias", "layers.1.weight"]),  # in the model's order
        ("layers.*", ["layers.0.weight", "layers.0.bias", "layers.1.weight"]),
        ("*.[0].weight", ["layers.0.weight"]),
        ("*", NAMES[:-1]),
        (re.compile(r"layers\.\d+\.weight"), ["layers.0.weight", "layers.1.weight"]),
        (["layers.0.*", "*.bias", re.compile(r"wte\..*")], ["wte.weight", "layers.0.weight", "layers.0.bias"]),
        ("head.weight", ["head.weight"]),  # its only name among those that match
        (["head.weight", "wte.weight"], ["wte.weight"]),
    ],
    ids=str,
)
def test_names_globs_and_regular_expressions(params, wanted: list[str]) -> None:
    assert names_of(params) == wanted


def test_a_regular_expression_must_match_all_of_a_name() -> None:
    with pytest.raises(ConfigError, match=r"nothing matches 'layers'; the model has wte\.weight, layers\.0\.weight, "):
        names_of(re.compile("layers"))


def test_a_name_with_brackets_is_found_as_it_is() -> None:
    model = nn.Module()
    model.register_parameter("w[0]", nn.Parameter(torch.zeros(2)))
    assert names_of("w[0]", model) == ["w[0]"]


def test_parameters_by_names_of_ones_own() -> None:
    model = Tied()
    assert names_of({"b": model.layers[0].bias, "a": model.wte.weight}, model, model=None) == ["b", "a"]


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda model: torch.compile(model), ""),
        (nn.DataParallel, "module."),
        (lambda model: nn.Sequential(torch.compile(model)), "0."),
    ],
)
def test_compiled_models_have_the_names_of_their_own(wrap, prefix: str) -> None:
    assert names_of("*", wrap(Tied())) == [prefix + name for name in NAMES[:-1]]


def test_distributed_models_have_the_names_of_their_own(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        for inner in (Tied(), torch.compile(Tied())):
            ddp = nn.parallel.DistributedDataParallel(inner)
            assert names_of("*", ddp) == names_of("*", torch.compile(ddp)) == NAMES[:-1]
    finally:
        torch.distributed.destroy_process_group()


def test_tied_parameters_are_recorded_once() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selections, tied = select("*", model=model, optimizers=[optimizer], rows={"head.weight": [1]})
    assert [x.name for x in selections] == NAMES[:-1]
    assert selections[0].param is model.wte.weight
    assert selections[0].rows.tolist() == [1]
    assert tied == {"head.weight": "wte.weight"}


def test_tied_parameters_are_found_in_the_file_under_each_name(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    rows = {"head.weight": [4, 1]}
    with Recorder(optimizer, "*.weight", model=model, rows=rows, steps=2, path=tmp_path / "t") as recorder:
        for _ in range(2):
            model(torch.arange(6)).square().sum().backward()
            optimizer.step()
            recorder.log(loss=torch.ones(()))
    trace = open_trace(tmp_path / "t")
    assert "head.weight" not in list(trace)
    assert torch.equal(trace["head.weight"][2], model.wte.weight[[4, 1]])
    for field in ("grad", "exp_avg", "exp_avg_sq"):
        assert torch.equal(trace[f"head.weight.{field}"], trace[f"wte.weight.{field}"])
        assert trace[f"head.weight.{field}"][2].any()
    assert trace["wte.weight.rows"].tolist() == trace["head.weight.rows"].tolist() == [4, 1]


def test_what_cannot_be_selected() -> None:
    model = Tied()
    model.layers[1].requires_grad_(False)
    some = torch.optim.SGD(model.layers[0].parameters(), lr=0.1)
    for params, options, message in [
        ("layers.1.*", {}, r"cannot record frozen parameters \(requires_grad=False\): layers\.1\.weight"),
        (["wte.weight", "layers.1.weight"], {}, r"cannot record frozen parameters .*: layers\.1\.weight"),
        (
            ["wte.weight", "layers.0.bias"],
            {"optimizers": [some]},
            r"must be updated by the optimizer, but none of its groups has wte\.weight",
        ),
        ({"x": nn.Parameter(torch.zeros(2))}, {}, "must be updated by the optimizer, but none of its groups has x"),
        ("wpe.*", {}, rf"nothing matches 'wpe\.\*'; the model has {', '.join(NAMES)}".replace(".w", r"\.w")),
        (["wte.weight", "wpe"], {}, "nothing matches 'wpe'"),
        ("wte.weight", {"model": None}, "params are names or patterns, so model= is needed to look them up"),
        ({}, {}, "params must name at least one parameter, got none"),
        ([], {}, "params must name at least one parameter, got none"),
        ([], {"model": None}, "params must name at least one parameter, got none"),
    ]:
        with pytest.raises(ConfigError, match=message):
            names_of(params, model, **options)


def test_patterns_pass_over_frozen_parameters() -> None:
    model = Tied()
    model.layers[1].requires_grad_(False)
    assert names_of("layers.*", model) == ["layers.0.weight", "layers.0.bias"]
    assert names_of(["layers.*", re.compile("wte.*")], model) == ["wte.weight", "layers.0.weight", "layers.0.bias"]


def test_a_message_names_only_some_of_many() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(50)))
    with pytest.raises(ConfigError, match=r"the model has 0\.weight, .*, 7\.weight and 42 more$"):
        names_of("gone", model)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def rows_of(rows, shape: tuple[int, ...] = (6, 4)) -> torch.Tensor:
    param = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.SGD([param], lr=0.1)
    (selection,), _ = select({"w": param}, model=None, optimizers=[optimizer], rows={"w": rows})
    assert selection.rows is not None
    return selection.rows


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([5, 0, 3], [5, 0, 3]),
        ((1, 2), [1, 2]),
        (range(1, 6, 2), [1, 3, 5]),
        (torch.tensor([4, 2], dtype=torch.int32), [4, 2]),
        (torch.tensor([1, 255 - 250], dtype=torch.uint8), [1, 5]),
        (torch.tensor([True, False, False, True, False, True]), [0, 3, 5]),
        ([False, True, False, False, False, False], [1]),
        ([2, 2], [2, 2]),  # as asked for
        ([], []),
        (torch.zeros(6, dtype=torch.bool), []),
    ],
    ids=str,
)
def test_rows(rows, wanted: list[int]) -> None:
    found = rows_of(rows)
    assert found.dtype == torch.int64
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([6], r"rows\['w'\] must be 0 to 5, got 6 to 6"),
        ([-1, 3], r"must be 0 to 5, got -1 to 3"),
        ([True, False], r"as a mask must have shape \[6\], got \[2\]"),
        (torch.ones(6, 4, dtype=torch.bool), r"as a mask must have shape \[6\], got \[6, 4\]"),
        ([0.0, 1.0], r"must be a 1-D sequence of integers, or a mask, got torch\.float32 \[2\]"),
        (
            torch.zeros(2, 2, dtype=torch.int64),
            r"must be a 1-D sequence of integers, or a mask, got torch\.int64 \[2, 2\]",
        ),
        (torch.tensor(1), r"must be a 1-D sequence of integers, or a mask, got torch\.int64 \[\]"),
    ],
    ids=str,
)
def test_refuses_rows(rows, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows_of(rows)


@pytest.mark.parametrize("rows", [[0], [], torch.tensor(True)], ids=str)
def test_a_scalar_has_no_rows(rows) -> None:
    with pytest.raises(ConfigError, match=r"rows\['w'\] must be left out: the parameter is a scalar"):
        rows_of(rows, shape=())


def test_refuses_rows_of_what_is_not_selected() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name in ("layers.0.bias", "gone"):
        with pytest.raises(ConfigError, match=rf"rows are given for {name}, which params do not include"):
            select("wte.*", model=model, optimizers=[optimizer], rows={name: [0]})


def test_zero_redundancy_optimizers_are_refused(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(4, 2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        with pytest.raises(
            ConfigError, match="ZeroRedundancyOptimizer keeps the state of only some parameters on each rank"
        ):
            Recorder(optimizer, "*", model=model, steps=1, path=tmp_path / "t")
    finally:
        torch.distributed.destroy_process_group()
