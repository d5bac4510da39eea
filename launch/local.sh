#!/usr/bin/env bash
# Train on this host: torchrun with one rank per GPU, or with RANKS ranks (default 1) where there is none.
#
#   launch/local.sh CONFIG [key=value ...]
#   RANKS=2 launch/local.sh configs/own_data.yaml train.zero_stage=2
#
# Needs the environment of `make env`, or SELORA_BIN=DIR with selora, python and torchrun.
# Press Ctrl-C once to save and stop; the same command continues. A stopped run does not exit with 0 (torchrun turns its
# ranks' 130 into 1), so `launch/local.sh CONFIG && selora promote ...` promotes only finished runs.
set -euo pipefail

[[ $# -ge 1 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=${SELORA_BIN:-$here/.venv/bin}
[[ -x $bin/torchrun ]] || { echo "no torchrun in $bin: run \`make env\` or set SELORA_BIN" >&2; exit 2; }

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus | grep -c '^GPU' || true); fi
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}

# After a signal, give workers time to finish a step and save; torchrun's default is 30 s.
exec "$bin/torchrun" --standalone --nproc-per-node "$ranks" --shutdown-timeout 240 \
    --no-python "$bin/selora" train "$@"
