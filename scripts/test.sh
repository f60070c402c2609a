#!/usr/bin/env bash
# The whole test suite; --long adds the long form. Anything else goes to pytest: scripts/test.sh tests/data/test_index.py
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

marks="not long"
if [ "${1:-}" = --long ]; then
  marks=""
  shift
fi
unset PYTHONDONTWRITEBYTECODE # else each of the processes that tests start would compile the package anew
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads leave the core to the other file's tests
# One file at a time for each core, in order, so that the slow files are not the last.
exec python -m pytest -q -m "$marks" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
  --benchmark-disable "$@"
