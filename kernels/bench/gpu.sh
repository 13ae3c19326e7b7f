#!/usr/bin/env bash
# Everything a GPU can show, in one call: checks, operations on logits, heads against every peer.
#   kernels/bench/gpu.sh OUTPUT [PEERS] [arguments of heads.py, for example --cases "DPO, trained head"]
# Needs torch and triton alone.  PEERS holds trl/kernels where TRL is not installed, "" where it is.
# Tables are written to OUTPUT after each row, so that a call that is cut off keeps what it has.
set -uo pipefail
cd "$(dirname "$0")/../.."
output=$1 peers=${2:-}
shift $(($# < 2 ? $# : 2))
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
mkdir -p "$output"
python3 -m pytest -q tests/kernels -m "not peers and not slow" 2>&1 | tee "$output/checks.log" | tail -40
python3 kernels/bench/tiles.py --output "$output"
python3 kernels/bench/logits.py --output "$output"
python3 kernels/bench/heads.py --output "$output" ${peers:+--peers "$peers"} "$@"
