#!/usr/bin/env bash
# What only a GPU can prove: the cuda tests, then steps, profile and start-up, as JSON and a picture in OUT.
# Usage: scripts/gpu_proof.sh [OUT] [--small]. Uses PYTHON, else .venv, else python3: nothing is installed.
set -euo pipefail
out=$(realpath -m "${1:-bench/results/gpu_proof}")
shift || true
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

mkdir -p "$out"
if "$python" -c 'import pytest' 2>/dev/null; then
  # The project's own settings make every warning an error; another torch than the pinned one may have its own.
  PYTHONPATH=. "$python" -m pytest -q -m cuda -W default -p no:cacheprovider tests/test_engines.py tests/test_train.py \
    | tee "$out/cuda_tests.txt" || { [ "${PIPESTATUS[0]}" -eq 5 ] || exit 1; }
else
  echo "cuda tests: skipped, pytest is not installed"
fi
PYTHONPATH=. "$python" -m bench.gpu_proof "$out" "$@"
