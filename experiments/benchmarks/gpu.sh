#!/usr/bin/env bash
# Measures attention, the train step and decoding at the shape of Ouro-1.4B on one GPU, in ten minutes in total. Results
# are relative to limits of the GPU measured in the same run: the speed of a matrix product, the bandwidth of a sum.
#
#   experiments/benchmarks/gpu.sh            # needs looplm_jax[cuda13], and torch for the twin
#   experiments/benchmarks/gpu.sh --tiny     # to check that everything runs, on any machine, in a few minutes
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python}
attention=(--turns 5)
train=(--steps 4)
decode=(--shape ouro-1.4b --tokens 16 --rounds 3 --no-twin)
if [ "${1:-}" = --tiny ]; then
  attention=(--lengths 128 --tokens 256 --heads 2 --turns 1)
  train=(--shape tiny --steps 1 --turns 1 --remat layer --no-twin)
  decode=(--shape tiny --batches 2 --tokens 2 --rounds 1 --no-twin)
elif [ $# -gt 0 ]; then
  echo "usage: $0 [--tiny]" >&2
  exit 2
fi

# A program that one process compiled is reused by the next.
JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
export JAX_COMPILATION_CACHE_DIR
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT

status=0
# part TITLE SECONDS MODULE ARGUMENTS...: runs a benchmark for at most SECONDS; the other parts run even if it fails.
part() {
  printf '\n## %s\n\n' "$1"
  timeout --kill-after=5 "$2" "$python" -m "experiments.benchmarks.$3" "${@:4}" || { echo "failed"; status=1; }
}

# The sum of the limits is less than ten minutes.
part 'Attention, forward and backward' 90 attention "${attention[@]}"
part 'Train step' 300 train_step_gpu --seconds 285 "${train[@]}"
part 'Decoding' 200 decode --seconds 120 "${decode[@]}"
exit "$status"
