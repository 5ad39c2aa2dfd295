"""What the operations refuse, what torch is told of them, and which implementation of them runs."""

from __future__ import annotations

import re

import pytest
import torch
from test_ops import coefficients, tensors
from torch import Tensor

from bhfast.ops import arithmetic
from bhfast.ops import extension as module
from bhfast.optim import FusedAdam


def adam_arguments(generator: torch.Generator, device: torch.device | str = "cpu") -> dict[str, object]:
    sizes = [5, 70]
    state = tensors(sum(sizes), torch.bfloat16, generator, finite=True)
    params, grads, exp_avgs, exp_avg_sqs = ([x.clone().to(device) for x in t.split(sizes)] for t in state)
    rings = [torch.zeros(3, 70, dtype=torch.bfloat16, device=device) for _ in range(2)]
    return {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs,
        "coefficients": coefficients()[0], "clip_coef": torch.tensor(0.5, device=device), "rounding": "per-op",
        "rings": rings, "ring_of": [4, 7], "step": torch.tensor(5), "every": 1,
    }  # fmt: skip


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


WRONG = {
    "params[0] must be bfloat16 or float32, got float16": {"params": [zeros(5).half(), zeros(70).half()]},
    "params[1] must be bfloat16 like params[0], got float32": {"params": [zeros(5), zeros(70).float()]},
    "grads must be as many as params (2), got 1": {"grads": [zeros(5)]},
    "grads[0] must be bfloat16 like params[0], got float32": {"grads": [zeros(5).float(), zeros(70)]},
    "exp_avgs[0] must have shape [5] like params[0], got [4]": {"exp_avgs": [zeros(4), zeros(70)]},
    "exp_avg_sqs[1] must have shape [70] like params[1], got [7, 10]": {"exp_avg_sqs": [zeros(5), zeros(7, 10)]},
    "coefficients must have 7 elements, got 6": {"coefficients": zeros(6).float()},
    "coefficients must be float32, got float64": {"coefficients": zeros(7).double()},
    "clip_coef must have 1 elements, got 2": {"clip_coef": zeros(2).float()},
    "rounding must be per-op or opmath, got up": {"rounding": "up"},
    "ring_of must be as many as rings (2), got 1": {"ring_of": [4]},
    "ring_of[1] must be a field of one of the params (below 8), got 8": {"ring_of": [4, 8]},
    "ring_of[0] must be a field of one of the params (below 8), got -1": {"ring_of": [-1, 4]},
    "step must be given with rings, got None": {"step": None},
    "step must be int64, got float32": {"step": torch.tensor(5.0)},
    "every must be at least 1, got 0": {"every": 0},
    "rings[1] must have shape [slots, *[70]], got [3, 71]": {"rings": [zeros(3, 70), zeros(3, 71)]},
    "rings[0] must have shape [slots, *[70]], got []": {"rings": [zeros(), zeros(3, 70)]},
    "rings[1] must have as many slots as the first ring (3), at least 1, got 2": {
        "rings": [zeros(3, 70), zeros(2, 70)]
    },
    "rings[0] must be bfloat16 like what it records, got float32": {"rings": [zeros(3, 70).float(), zeros(3, 70)]},
    "rings[0] must be contiguous": {"rings": [zeros(3, 140)[:, ::2], zeros(3, 70)]},
}


@pytest.mark.parametrize("message", WRONG)
def test_adam_says_what_is_wrong(message, kernels, generator) -> None:
    def place(x):
        return [place(y) for y in x] if isinstance(x, list) else x.to(kernels.device) if isinstance(x, Tensor) else x

    wrong = {name: place(x) for name, x in WRONG[message].items()}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        kernels.adam_(**adam_arguments(generator, kernels.device) | wrong)


def test_record_says_what_is_wrong(kernels) -> None:
    values = [torch.zeros(3, device=kernels.device), torch.zeros(2, device=kernels.device)]
    with pytest.raises(ValueError, match=r"rings must be as many as values \(2\), got 1"):
        kernels.record_(values, [torch.zeros(4, 3, device=kernels.device)], torch.tensor(1), 1)


def test_clip_coefficient_says_what_is_wrong(kernels) -> None:
    grads = [torch.zeros(2, dtype=dtype, device=kernels.device) for dtype in (torch.float32, torch.int64)]
    with pytest.raises(TypeError, match=r"grads\[1\] must be bfloat16 or float32, got int64"):
        kernels.clip_coefficient(grads, 1.0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_operations_keep_the_contracts_of_torch(device, generator) -> None:
    ops = torch.ops.bhfast
    arguments = adam_arguments(generator, device)
    torch.library.opcheck(ops.adam_, tuple(arguments.values()))
    torch.library.opcheck(ops.adam_, (*list(arguments.values())[:7], [], [], None, 1))
    torch.library.opcheck(ops.clip_coefficient, (arguments["grads"], 1.0))
    values = [torch.ones(3, device=device), torch.tensor(2, device=device)]
    rings = [torch.zeros(4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)]
    torch.library.opcheck(ops.record_, (values, rings, torch.tensor(6), 2))


# ---------------------------------------------------------------------------------------------------------------------
# The extension


def test_backend_says_why(monkeypatch) -> None:
    for device in ("cpu", "cuda", "mps"):
        name, reason = module.backend(device)
        assert name in ("torch", "C++", "CUDA")
        assert reason
    monkeypatch.setattr(module, "_extension", None)
    monkeypatch.setattr(module, "_unavailable", "no such luck")
    assert module.backend() == ("torch", "no such luck")


def test_an_extension_that_does_not_load_is_distinguished_from_one_that_is_not_built(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(module.importlib, "import_module", missing)
    assert "not built" in module._load()[1]
    monkeypatch.setattr(module.importlib, "import_module", broken)
    assert module._load() == (None, "the extension does not load: undefined symbol: _ZN3c10; rebuild it")


def test_a_torch_without_the_stable_abi_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert module._load() == (None, "the extension needs torch 2.10 or newer, this is 2.9.1+cu128")


def test_the_first_optimizer_in_pure_torch_warns(monkeypatch) -> None:
    def make() -> FusedAdam:
        return FusedAdam([torch.nn.Parameter(torch.zeros(3))])

    module.warn_if_missing.cache_clear()
    monkeypatch.setattr(module, "_extension", None)
    monkeypatch.setattr(module, "_unavailable", "no such luck")
    with pytest.warns(RuntimeWarning, match="FusedAdam runs in pure torch, .*: no such luck") as warned:
        make()
        make()
    assert [warning.filename for warning in warned] == [__file__]
    module.warn_if_missing.cache_clear()


def test_autograd_knows_what_compiled_kernels_write_to(kernels, generator) -> None:
    arguments = adam_arguments(generator, kernels.device)
    before = {name: [x._version for x in arguments[name]] for name in ("params", "grads", "exp_avgs", "rings")}
    kernels.adam_(**arguments)
    for name, versions in before.items():
        is_newer = [x._version > version for x, version in zip(arguments[name], versions, strict=True)]
        assert is_newer == [name != "grads"] * 2
    with torch.inference_mode():
        inference = adam_arguments(generator, kernels.device)
        kernels.adam_(**inference)


@pytest.mark.parametrize("operation", ["clip_coefficient", "adam_", "record_"])
def test_what_backend_says_is_what_runs(operation: str, extension) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert module.backend("cpu")[0] == "C++"
    assert has_kernel(f"bhfast::{operation}", "CPU")
    assert has_kernel(f"bhfast::{operation}", "CUDA") == (module.backend("cuda")[0] == "CUDA")


def test_norm_block_is_the_same_in_cpp(extension) -> None:
    assert extension.norm_block == arithmetic.NORM_BLOCK


def test_instruction_sets(extension) -> None:
    assert extension.instruction_sets()[-1] == "portable"
    with pytest.raises(
        ValueError, match=r"instruction_set must be one that this machine supports \(.*portable\), got 'sse'"
    ):
        extension.use_instruction_set("sse")
