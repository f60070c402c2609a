#!/usr/bin/env bash
# Everything that needs a GPU: the cuda tests, then all benchmarks, with results, plots and report in OUT.
# Usage: scripts/gpu_proof.sh [OUT] [--small] [options of `python -m bench`]. --small only shows that all of it runs.
# Uses PYTHON, else .venv, else python3. Installs nothing: names the missing packages, and skips what needs them.
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
for package in \
  pytest pytest_benchmark triton nvidia.dali simplejpeg yaml click rich wandb matplotlib pydantic torchvision; do
  "$python" -c "import $package" 2>/dev/null || echo "$package: not installed; skipping what needs it"
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
