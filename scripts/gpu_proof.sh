#!/usr/bin/env bash
# What only a GPU can prove: the cuda tests, then all benchmarks, with results, pictures and report in OUT.
# Usage: scripts/gpu_proof.sh [OUT] [--small] [what `python -m bench` takes]. --small shows that the parts work.
# Uses PYTHON, else .venv, else python3, and nothing is installed: what a package is missing for is named and left out.
set -euo pipefail
out=bench/results/gpu_proof
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  out=$1
  shift
fi
out=$(realpath -m "$out")
arguments=()
for argument in "$@"; do
  if [ "$argument" = --small ]; then arguments+=(--scale smoke); else arguments+=("$argument"); fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}

mkdir -p "$out"
for package in pytest pytest_benchmark triton nvidia.dali simplejpeg yaml click rich wandb matplotlib torchvision; do
  "$python" -c "import $package" 2>/dev/null || echo "$package: not installed; what needs it is left out"
done
if "$python" -c 'import pytest' 2>/dev/null; then
  # The project's own settings make every warning an error; another torch than the pinned one may have its own.
  "$python" -m pytest -q -m cuda -W default -p no:cacheprovider \
    tests/{training/test_engines,runs/test_train,data/test_loader,network/test_fused,system/test_ranks}.py \
    | tee "$out/cuda_tests.txt" || { [ "${PIPESTATUS[0]}" -eq 5 ] || exit 1; }
fi
if "$python" -c 'import triton' 2>/dev/null; then
  "$python" -m bench.kernels --quick --types bf16 --activations relu gelu | tee "$out/kernels.md"
fi
"$python" -m bench --out "$out" ${arguments[@]+"${arguments[@]}"}
