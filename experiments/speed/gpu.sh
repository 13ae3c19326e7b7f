#!/usr/bin/env bash
# What a GPU has to show of training: packed rows through variable-length attention, then a step beside TRL's.
#   experiments/speed/gpu.sh OUTPUT [arguments of experiments.training_speed]
#   for example: experiments/speed/gpu.sh out --shapes 1.5b --cases "long full live" "long lora live"
# Needs torch, triton, transformers and peft; rows of TRL need it and `datasets` as well.  A case takes some minutes.
set -uo pipefail
cd "$(dirname "$0")/../.."
output=$1
shift
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
mkdir -p "$output"
python3 -m pytest -q -m gpu tests/test_layouts.py 2>&1 | tee "$output/layouts.log" | tail -20
python3 -m experiments.training_speed --output "$output" "$@"
