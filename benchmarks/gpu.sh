#!/usr/bin/env bash
# All that needs a GPU, in one go: build, tests, a whole verified run, benchmarks, and our kernels under sanitizers.
#
#     benchmarks/gpu.sh [FOLDER]      the figures go to FOLDER/gpu-NAME.json (default: benchmarks/results)
#
# Takes the Python at hand (PYTHON=... names another), which needs a CUDA build of torch, nvcc, and the test and bench
# extras. It takes less than 8 minutes; nothing is skipped for want of a GPU.
set -euo pipefail
folder=$(realpath "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export BHFAST_REQUIRE_CUDA=1 BHFAST_REQUIRE_EXTENSION=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
section() { echo; echo "== $1 ($SECONDS s)"; }

section build
BHFAST_BUILD=cuda "$python" setup.py -q build_ext --inplace >"$scratch/build.log" 2>&1 || {
  tail -40 "$scratch/build.log"
  exit 1
}
"$python" -m bhfast.doctor

section tests
"$python" -m pytest -q -r fE -p no:cacheprovider tests

section "10,000 steps, verified"
"$python" -m bhfast.train --device cuda --engine graph --out "$scratch/t.safetensors"
"$python" -m bhfast.verify "$scratch/t.safetensors"

section benchmarks
name=$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')
mkdir -p "$folder"
"$python" -m pytest benchmarks -q --benchmark-only -k "graph or step_by_step or (adam and cuda)" \
  --benchmark-json "$folder/gpu-$name.json"
section sanitizers
short=(-m bhfast.train --device cuda --engine graph --steps 20 --quiet --overwrite --out "$scratch/s.safetensors")
for tool in memcheck racecheck; do
  compute-sanitizer --tool "$tool" --kernel-regex kns=bhfast --report-api-errors no --error-exitcode 1 \
    "$python" "${short[@]}"
done

section "done: $folder/gpu-$name.json"
