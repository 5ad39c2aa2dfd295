#!/usr/bin/env bash
# All that needs a GPU, in one go and under 10 minutes; figures first. Every section runs, whatever became of the others.
#
#     benchmarks/gpu.sh [FOLDER]      (default: benchmarks/results)
#
# leaves in FOLDER: gpu-summary.txt, what this prints; gpu-engines.json and gpu-adam.json, the figures; gpu.log, all output.
# Exit status 1 if a section failed; the last line names those that did. It needs a CUDA build of torch, nvcc, and the
# test and bench extras; it installs nothing. PYTHON=... names another Python than python3.
set -um # m: each section is a process group, so that its children can be killed with it
root=$(realpath "$(dirname "$0")/..")
folder=$(realpath -m "${1:-$root/benchmarks/results}")
cd "$root" || exit
mkdir -p "$folder" || exit
python=${PYTHON:-python3}
limit=${LIMIT:-570}        # seconds for all sections,
most=${SECTION_LIMIT:-570} # for each of them,
grace=${GRACE:-5}          # and from a section's interruption to its end
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
  echo "== $name: $*" >>"$log"
  begins=$(($(wc -l <"$log") + 1))
  if ((seconds <= 0)); then
    verdict="no time left"
  else
    # SIGINT: an interrupted pytest still reports, and writes its JSON.
    timeout -s INT -k "$grace" "$seconds" "$@" >>"$log" 2>&1 </dev/null &
    group=$!
    wait "$group" 2>/dev/null
    status=$?
    end_group # whoever it left running
    group=
    verdict="failed, status $status"
    ((SECONDS - begun < seconds)) || verdict="out of time"
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

# Up to the figures the limits add up to less than 570: nothing can take their time.
section build 130 env BHFAST_BUILD=cuda "$python" setup.py -q build_ext --inplace
section doctor 20 "$python" -m bhfast.doctor
section kernels 80 "${tests[@]}" tests -k cuda
for engine in graph resident; do
  section "train-$engine" 25 "${train[@]}" --engine $engine --out "$scratch/$engine.safetensors"
  section "verify-$engine" 20 "$python" -m bhfast.verify "$scratch/$engine.safetensors"
done
section engines 180 "${tests[@]}" benchmarks/test_bench_gpu.py --benchmark-json "$folder/gpu-engines.json"
section adam 60 "${tests[@]}" benchmarks/test_bench_adam.py -k cuda --benchmark-json "$folder/gpu-adam.json"
for engine in graph resident; do
  for tool in memcheck racecheck; do
    section "$tool-$engine" 60 "${sanitizer[@]}" --tool "$tool" "${train[@]}" --engine $engine --steps 20 --quiet \
      --out "$scratch/$tool-$engine.safetensors"
  done
done
section tests 570 "${tests[@]}" tests

echo "failed: ${failed[*]:-none}" | tee -a "$summary"
((${#failed[@]} == 0))
