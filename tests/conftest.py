"""Fixtures for all tests: devices, a small corpus, a short recorded run."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start have it too
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or two threads spin on the core that the other tests need
import torch
from traces import record

from bhfast import tokens
from bhfast.config import TrainConfig
from bhfast.ops import extension as module
from bhfast.ops import kernels as torch_kernels
from bhfast.train import TrainResult, train


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is imported: to walk through all of torch takes it a third of a second."""
    gc.collect()
    gc.freeze()


REQUIRE_CUDA = os.environ.get("BHFAST_REQUIRE_CUDA") == "1"
REQUIRE_EXTENSION = os.environ.get("BHFAST_REQUIRE_EXTENSION") == "1"


def require(device: str) -> torch.device:
    """Skip the test where the device is missing; but with BHFAST_REQUIRE_CUDA=1 the tests of CUDA run, and fail."""
    there = {"cpu": True, "cuda": torch.cuda.is_available() or REQUIRE_CUDA, "mps": torch.backends.mps.is_available()}
    if not there[device]:
        pytest.skip(f"this machine has no {device}")
    return torch.device(device)


@pytest.fixture(params=["cpu", "cuda", "mps"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device."""
    return require(request.param)


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """The compiled extension; with BHFAST_REQUIRE_EXTENSION=1 its tests fail rather than skip where it is missing."""
    if module._extension is None and not REQUIRE_EXTENSION:
        pytest.skip(module.backend()[1])
    assert module._extension is not None, module.backend()[1]
    return module._extension


OPERATIONS = ("clip_coefficient", "adam_", "record_")


@pytest.fixture(scope="session")
def cuda_on_cpu(extension: ModuleType) -> SimpleNamespace:
    """The operations with their CUDA kernels, which the CPU executes; and ``module``, with the resident engine.

    The kernels get a step's scalars by address, or by value after ``by_value(True)``. ``seed(n)`` seeds the order in
    which threads run.
    """
    from cuda_on_cpu import build

    library = build.library()
    for name in OPERATIONS:
        schema = str(getattr(torch.ops.bhfast, name).default._schema)
        torch.library.define(f"bhfast_cuda_on_cpu::{name}", schema[schema.index("(") :])
    torch.ops.load_library(library)
    stand_in = ctypes.CDLL(library)
    by_value = ctypes.c_bool.in_dll(stand_in, "scalars_by_value")
    stand_in.cuda_on_cpu_seed.argtypes = (ctypes.c_uint64,)
    loader = ExtensionFileLoader("kernels", str(library))
    module_on_cpu = module_from_spec(spec_from_loader("kernels", loader))
    loader.exec_module(module_on_cpu)
    operations = {}
    for name in OPERATIONS:
        own = getattr(torch_kernels, name)
        operation = getattr(torch.ops.bhfast_cuda_on_cpu, name).default
        operations[name] = torch_kernels.caller(operation, own.__wrapped__, own.check)
    return SimpleNamespace(
        module=module_on_cpu,
        by_value=lambda value: setattr(by_value, "value", value),
        seed=stand_in.cuda_on_cpu_seed,
        **operations,
    )


INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "neonbf16", "neon", "portable")
KERNELS = [
    *[("torch", device) for device in ("cpu", "cuda", "mps")],
    *[(instructions, "cpu") for instructions in INSTRUCTION_SETS],
    ("compiled", "cuda"),
    ("cuda-on", "cpu"),
]


@pytest.fixture(params=KERNELS, ids="-".join)
def kernels(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The operations in each implementation, and its ``device``.

    That is pure torch on every device, and what the extension brings: on the CPU one for each instruction set; besides,
    the CUDA kernels executed by the CPU.
    """
    name, device = request.param[0], require(request.param[1])
    operations = {name: getattr(torch_kernels, name) for name in OPERATIONS}
    if name == "cuda-on":
        operations = {**vars(request.getfixturevalue("cuda_on_cpu"))}
    if name == "torch":
        operations = {key: operation.__wrapped__ for key, operation in operations.items()}
    operations["adam_"] = partial(_recording_nothing, operations["adam_"])
    here = SimpleNamespace(device=device, **operations)
    if name in ("torch", "cuda-on"):
        yield here
        return
    extension = request.getfixturevalue("extension")
    if device.type == "cuda":
        assert module.backend(device)[0] == "CUDA", module.backend(device)[1]
        yield here
        return
    if name not in extension.instruction_sets():
        pytest.skip(f"this machine has no {name}")
    best = extension.instruction_set()
    extension.use_instruction_set(name)
    yield here
    extension.use_instruction_set(best)


def _recording_nothing(adam_: Callable[..., None], *args: object, **kwargs: object) -> None:
    """Call ``adam_``; by default without rings."""
    named = dict(zip(inspect.signature(adam_).parameters, args, strict=False))
    adam_(**{"rings": (), "ring_of": (), "step": None, "every": 1, **named, **kwargs})


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return what makes a folder for all processes that run tests side by side: the first that asks for it fills it."""
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = common / name, common / f"{name}.unfinished"
        with open(common / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return make


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Tests run side by side, with one thread of torch each, but for those that ask for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def text() -> str:
    """The corpus that the runs of the tests train on: the built-in one."""
    return str(tokens.builtin_path())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, text: str) -> TrainResult:
    """A recorded run of 130 steps at sigma 0. Do not write to its file."""
    path = tmp_path_factory.mktemp("run") / "trace.safetensors"
    return train(TrainConfig(steps=130, corpus=text, out=str(path), device="cpu", quiet=True))


@pytest.fixture
def copy_of_run(run: TrainResult, tmp_path: Path) -> Path:
    """A copy of the short run's file, to damage."""
    path = tmp_path / "copy.safetensors"
    path.write_bytes(run.path.read_bytes())
    return path


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A small trace that a replay proves."""
    record(tmp_path / "t.safetensors", metadata={"of": "π", "seed": "1"})
    return tmp_path / "t.safetensors"
