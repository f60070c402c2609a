#!/usr/bin/env bash
# The whole test suite; --long adds the long form. Anything else goes to pytest: scripts/test.sh tests/test_index.py
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

marks="not long"
if [ "${1:-}" = --long ]; then
  marks=""
  shift
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait take no core from the other file's
# A file at a time to each core, in the order in which they stand: the slow ones are not the last.
exec python -m pytest -q -m "$marks" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
  --benchmark-disable "$@"
