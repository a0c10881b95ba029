#!/usr/bin/env bash
# All that there is to measure on a card, in one command: rollouts and updates of every size, roles that share the card, and Wan 1.3B
# with its VAE, from its import to streams. `--tiny` tries it on a CPU, in three minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/gpu}
mkdir -p "$out"
if [ "${1:-}" = --tiny ]; then
  "$python" -m tests.benchmarks --out "$out/rollouts" --parts '["rollout"]' --sizes '["tiny"]' --rounds 1 --compiled false
  "$python" -m tests.benchmarks --out "$out/updates" --parts '["update", "memory"]' --sizes '["tiny"]' --rounds 1
  "$python" -m tests.benchmarks --out "$out/roles" --parts '["roles"]' --sizes '["tiny"]' --rounds 1
  "$python" -m tests.benchmarks.wan --quick --out "$out/wan"
else
  "$python" -m tests.benchmarks --out "$out/rollouts" --parts '["rollout"]' --sizes '["30M", "wan-1.3b", "wan-1.3b-framewise"]' --rounds 3
  "$python" -m tests.benchmarks --out "$out/updates" --parts '["update", "memory"]' --sizes '["30M", "wan-block"]' --rounds 3
  "$python" -m tests.benchmarks --out "$out/roles" --parts '["roles", "start"]' --sizes '["quickstart", "30M"]' --rounds 3
  "$python" -m tests.benchmarks.wan --out "$out/wan"
fi
