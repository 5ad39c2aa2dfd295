"""The data of the player against numpy, and the names of tokens."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from traces import saved, walk

from bhfast import lattice
from bhfast.errors import BhfastError
from bhfast.report import player as module
from bhfast.report.names import token_names
from bhfast.report.player import PlayerData, player_data, sampled_records
from bhfast.summary import find_vectors
from bhfast.trace import open_trace
from bhfast.train import TrainResult


def dequantised(data: PlayerData) -> np.ndarray:
    """The cloud, float64 ``[S, 5, N]``; NaN for what is not finite."""
    cloud, ranges = (data.tensors[name].numpy().astype(np.float64) for name in ("cloud", "ranges"))
    return np.where(cloud == 65535, np.nan, ranges[..., :1] + cloud / 65534 * ranges[..., 1:])


def ulp(x: np.ndarray, fraction_bits: int, least_exponent: int) -> np.ndarray:
    """The spacing of a lattice at values, one by one."""
    exponents = [max(np.frexp(abs(value))[1] - 1, least_exponent) if value else least_exponent for value in x.ravel()]
    return np.array([2.0 ** (e - fraction_bits) for e in exponents]).reshape(x.shape)


FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14), torch.float32: (23, -126)}


@pytest.mark.parametrize("dtype", FORMATS)
def test_data_against_numpy(dtype: torch.dtype, tmp_path: Path) -> None:
    vectors = walk(9, 12, 6, dtype=dtype)
    vectors[3:, 4] = vectors[3:, 7] = vectors[3:, 2]  # a black hole
    vectors[5, 9, 1] = float("nan")
    data = player_data(saved(tmp_path / "t", vectors), [f"n{i}" for i in range(12)])
    x = vectors.double().numpy()
    found = dequantised(data)
    axes = np.linalg.svd(x[-1] - x[-1].mean(0))[2][:3]
    axes *= np.sign(axes.sum(1))[:, None]
    for record in (0, 3, 8):
        offsets = x[record] - x[record].mean(0)
        wanted = [*(offsets @ axes.T).T, np.linalg.norm(offsets, axis=1), np.linalg.norm(x[record], axis=1)]
        np.testing.assert_allclose(found[record], wanted, atol=np.ptp(wanted) / 60000)
    assert np.isnan(found[5, :4]).all()  # there is no centroid
    assert np.isnan(found[5, 4]).tolist() == [i == 9 for i in range(12)]
    moves = (x[1:] - x[:-1]) / ulp(x[:-1], *FORMATS[dtype])
    stored = data.tensors["lattice"].double().numpy().transpose(1, 0, 2)
    np.testing.assert_allclose(stored[1:], moves, rtol=2**-8)
    assert np.isnan(stored[0]).all()
    np.testing.assert_allclose(data.tensors["displacement"][1:].double(), np.linalg.norm(moves, axis=2), rtol=2**-7)
    assert data.tensors["cell"][4].tolist() == [0, 1, 2, 3, 2, 5, 6, 2, 8, 9, 10, 11]
    assert data.tensors["distinct"][:, 0].tolist() == [12, 12, 12, *[10] * 6]
    for record, token in itertools.product((0, 4, 5), (2, 5, 7)):
        apart = np.linalg.norm(x[record] - x[record, token], axis=1)
        others = [i for i in range(12) if apart[i] > 0 and i not in ((4, 7) if record > 2 else ())]  # not the NaN
        nearest = sorted(others, key=apart.__getitem__)[:3]
        assert data.tensors["neighbours"][record, token].tolist() == nearest
        np.testing.assert_allclose(data.tensors["distances"][record, token], apart[nearest], rtol=1e-6)


def test_packed_data_is_a_safetensors_file(tmp_path: Path) -> None:
    found = saved(tmp_path / "t", walk(4, 5, 3), losses=torch.tensor([float("nan"), 3, 2, 4]))
    life = lattice.life(found.vectors, found.steps)
    data = player_data(found, ["é", "</script>", "b", "c", "d"], life, axes=[2, 0, 1])
    assert data.pack() == data.pack()
    tensors = load(gzip.decompress(data.pack()))
    assert all(torch.equal(tensors[name], x) or x.isnan().any() for name, x in data.tensors.items())
    assert torch.equal(tensors["life"], torch.stack(life).int())
    assert tensors["losses"].tolist() == [[3, 2, 4], [3, 2.5, 3]]
    assert tensors["loss_steps"].tolist() == [1, 2, 3]
    assert data.info["axes"] == ["dimension 2", "dimension 0", "dimension 1"]
    last = found.vectors[-1].double() - found.vectors[-1].double().mean(0)
    np.testing.assert_allclose(dequantised(data)[-1, :3], last[:, [2, 0, 1]].T, atol=1e-4)
    for axes in ([0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(BhfastError, match="axes must be three different dimensions from 0 to 2, got "):
            player_data(found, [], None, axes)


class Reads:
    """Stands for the vectors of a long run, and counts the records that are read."""

    dtype = torch.bfloat16

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.read: set[int] = set()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, record: int) -> torch.Tensor:
        self.read.add(record % len(self))
        return torch.full(self.shape[1:], record % 97).bfloat16() + torch.arange(self.shape[1])[:, None]


def test_of_a_large_trace_only_the_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 40)
    monkeypatch.setattr(module, "TOKEN_RECORDS", 40 * 64)
    monkeypatch.setattr(module, "LATTICE_VALUES", 60 * 4 * 10)
    found = saved(tmp_path / "t", walk(2, 3, 4))
    records = Reads(10_000, 300, 4)
    large = replace(found, vectors=records, steps=torch.arange(10_000), rows=torch.arange(300))
    data = player_data(large, [str(i) for i in range(300)])
    shown = data.tensors["records"].tolist()
    assert (shown[:4], shown[-1]) == ([0, 1, 2, 3], 9999)
    assert 50 < len(shown) <= 64
    assert records.read <= {*shown, *(max(0, record - 1) for record in shown)}
    assert data.info["names"] == [str(i) for i in data.tensors["rows"].tolist()]
    assert data.tensors["rows"][[0, -1]].tolist() == [0, 299]
    assert data.tensors["distinct"][0, 0] == len(records[0].unique(dim=0))  # of all
    notes = " ".join(data.info["notes"])
    for sampled in (
        f"{len(shown)} of 10,000 records",
        "40 of 300 tokens",
        f"{len(data.tensors['detailed'])} of the 40",
    ):
        assert sampled in notes


def test_records_are_sampled_in_both_scales() -> None:
    assert sampled_records(7, 7).tolist() == [*range(7)]
    some = sampled_records(10_001, 512)
    assert some[:20].tolist() == [*range(20)]
    assert some.diff().max() <= 40
    assert len(some) <= 512


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names(run: TrainResult, tmp_path: Path) -> None:
    names = token_names(find_vectors(open_trace(run.path)))
    assert (names[10], names[32], names[39], names[101]) == (r"'\n'", "' '", "'", "e")
    strings = ["a", "", " b", "\u202e", "\ud800"]
    save_file(
        {"recorded_steps": torch.arange(2), "W": walk(2, 5, 3)}, tmp_path / "t", {"token_strings": json.dumps(strings)}
    )
    found = find_vectors(open_trace(tmp_path / "t"))
    assert token_names(found) == ["a", "row 1", "' b'", r"'\u202e'", r"'\ud800'"]
    (tmp_path / "names").write_text("\n".join("vwxyz"))
    assert token_names(found, tmp_path / "names") == [*"vwxyz"]
    (tmp_path / "names").write_text("a\nb")
    with pytest.raises(
        BhfastError, match=r"names has 2 lines for 5 vectors of the rows up to 4: write one name a line"
    ):
        token_names(found, tmp_path / "names")
    (tmp_path / "names").write_bytes(b"\xff")
    with pytest.raises(BhfastError, match="names is not UTF-8 text: invalid start byte at byte 0"):
        token_names(found, tmp_path / "names")
    with pytest.raises(BhfastError, match=r"cannot read the names of tokens, .*none: No such file"):
        token_names(found, tmp_path / "none")
    save_file({"recorded_steps": torch.arange(2), "W": walk(2, 4, 3)}, tmp_path / "t", {"token_strings": "[1, 2"})
    assert token_names(find_vectors(open_trace(tmp_path / "t"))) == [f"row {i}" for i in range(4)]
