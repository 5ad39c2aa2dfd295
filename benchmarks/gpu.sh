#!/usr/bin/env bash
# All that needs a GPU, in one go and under 10 minutes; figures first. Every section runs, whatever became of the others.
#
#     benchmarks/gpu.sh [FOLDER]      (default: benchmarks/results)
#
# leaves in FOLDER: gpu-summary.txt, what this prints; gpu-engines.json, gpu-resident-C.json for C blocks, and gpu-adam.json,
# the figures; gpu.log, all output. A section's figures are written when it ends, and are there whatever comes after it. Exit status 1 if a section failed; the last line names those that did. It needs a CUDA build of torch, nvcc, and the
# test and bench extras; it installs nothing. PYTHON=... names another Python than python3.
set -um # m: each section is a process group, so that its children can be killed with it
root=$(realpath "$(dirname "$0")/..")
folder=$(realpath -m "${1:-$root/benchmarks/results}")
cd "$root" || exit
mkdir -p "$folder" || exit
python=${PYTHON:-python3}
limit=${LIMIT:-570}        # seconds for all sections,
most=${SECTION_LIMIT:-570} # for each of them,
grace=${GRACE:-5}          # of these, from a section's interruption to its end
log=$folder/gpu.log summary=$folder/gpu-summary.txt
export BHFAST_REQUIRE_CUDA=1 BHFAST_REQUIRE_EXTENSION=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # for the programs that tests start

scratch=$(mktemp -d)
group=
end_group() { [ -z "$group" ] || kill -KILL -- "-$group" 2>/dev/null; }
trap 'end_group; rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

failed=()
section() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 begun=$SECONDS verdict status begins
  shift 2
  ((seconds <= most)) || seconds=$most
  ((seconds <= limit - SECONDS)) || seconds=$((limit - SECONDS))
  echo "== $name, up to $seconds s: $*" >>"$log"
  begins=$(($(wc -l <"$log") + 1))
  if ((seconds <= 0)); then
    verdict="no time left"
  else
    # SIGINT: an interrupted pytest still reports, and writes its JSON.
    timeout -s INT -k "$grace" "$((seconds > grace ? seconds - grace : 1))" "$@" >>"$log" 2>&1 </dev/null &
    group=$!
    wait "$group" 2>/dev/null
    status=$?
    end_group # whoever it left running
    group=
    verdict="failed, status $status"
    ((status != 124)) || verdict="out of time"
    ((status != 137 || SECONDS - begun < seconds)) || verdict="out of time" # else something else has killed it
    ((status != 0)) || verdict=passed
  fi
  [ "$verdict" = passed ] || failed+=("$name")
  {
    echo "== $name: $verdict, $((SECONDS - begun)) s"
    tail -n "+$begins" "$log" | tail -n 30
  } | tee -a "$summary"
}

: >"$log" >"$summary"
tests=("$python" -m pytest -q -p no:cacheprovider)
train=("$python" -m bhfast.train --device cuda)
sanitizer=(compute-sanitizer --kernel-regex kns=bhfast --report-api-errors no --error-exitcode 1)

# Up to the sanitizers the limits, grace included, add up to 570: no section can take the time of another.
section build 110 env BHFAST_BUILD=cuda "$python" setup.py -q build_ext --inplace
section doctor 20 "$python" -m bhfast.doctor
section kernels 70 "${tests[@]}" tests -k cuda
for engine in graph resident; do
  section "train-$engine" 25 "${train[@]}" --engine $engine --out "$scratch/$engine.safetensors"
  section "verify-$engine" 20 "$python" -m bhfast.verify "$scratch/$engine.safetensors"
done
bench=("${tests[@]}" benchmarks/test_bench_gpu.py)
section engines 110 "${bench[@]}" -k "not resident" --benchmark-json "$folder/gpu-engines.json"
for blocks in 8 4 2 1 16; do # each by itself: a kernel that hangs cannot be interrupted
  section "resident-$blocks" 20 "${bench[@]}" -k "resident-$blocks]" --trainer "$folder/gpu-engines.json" \
    --benchmark-json "$folder/gpu-resident-$blocks.json"
done
section sweep-resident 25 "$python" -m bhfast.sweep --device cuda --engine resident --sigma 0 1e-4 1e-3 \
  --seed 1 2 3 4 5 6 7 8 --steps 1000 --keyframes 64 --out-dir "$scratch/sweep"
section verify-sweep 15 "$python" -m bhfast.verify "$scratch/sweep/sigma0.001_seed8.safetensors"
section adam 30 "${tests[@]}" benchmarks/test_bench_adam.py -k cuda --benchmark-json "$folder/gpu-adam.json"
for engine in graph resident; do
  for tool in memcheck racecheck; do
    section "$tool-$engine" 60 "${sanitizer[@]}" --tool "$tool" "${train[@]}" --engine $engine --steps 20 --quiet \
      --out "$scratch/$tool-$engine.safetensors"
  done
done
section tests 570 "${tests[@]}" tests

echo "failed: ${failed[*]:-none}" | tee -a "$summary"
((${#failed[@]} == 0))
