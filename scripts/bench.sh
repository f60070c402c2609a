#!/usr/bin/env bash
# All benchmarks, into bench/results/<machine>/: scripts/bench.sh [--quick] [--only GROUP...] [--photos DIR] ...
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

exec fastcnn bench "$@"
