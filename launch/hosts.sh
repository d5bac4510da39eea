#!/usr/bin/env bash
# Train on bare hosts over ssh: the deepspeed launcher, with pdsh as its runner.
#
#   launch/hosts.sh HOSTFILE CONFIG [key=value ...]
#   RESTARTS=5 launch/hosts.sh hosts.txt configs/own_data.yaml train.zero_stage=2 train.timeout_s=120
#
# Needs on every host: this directory and its environment under the same path, the shards, and `out` on a shared path;
# ssh without a password from this host, and pdsh on it. HOSTFILE: see hostfile.example; its first host leads.
# Optional: MASTER_ADDR, MASTER_PORT (29500), SSH_PORT (22). RESTARTS (0): after a failure wait until every host answers
# and continue from the last checkpoint, at most this number of times. A stopped run exits with 130.
set -euo pipefail

[[ $# -ge 2 ]] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
hostfile=$(realpath "$1"); shift
bin=${SELORA_BIN:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin}
command -v pdsh >/dev/null || { echo "pdsh is missing here: apt install pdsh (or your system's way)" >&2; exit 2; }
mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ {print $1}' "$hostfile")
[[ ${#hosts[@]} -ge 1 ]] || { echo "$hostfile names no host" >&2; exit 2; }

# Give up on a host whose link is down after a minute, instead of never.
ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} ${ssh_options[*]}"
export PATH="$bin:$PATH" # the launcher looks up its helpers here

answer() {
    local host
    for host in "${hosts[@]}"; do
        # shellcheck disable=SC2086 # PDSH_SSH_ARGS_APPEND is a list of words
        ssh -p "${SSH_PORT:-22}" $PDSH_SSH_ARGS_APPEND "$host" true </dev/null || { echo "$host does not answer" >&2; return 1; }
    done
}

answer || exit 1
stopped=0; trap 'stopped=1' INT # Ctrl-C reaches the launcher as well; its ranks save and end
for ((attempt = 0; ; attempt++)); do
    status=0
    "$bin/deepspeed" --hostfile "$hostfile" --force_multi --no_ssh_check --ssh_port "${SSH_PORT:-22}" \
        --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "$((${MASTER_PORT:-29500} + attempt))" \
        --module pipeline train "$@" || status=$?
    # 2 is a user's mistake, which a retry would repeat; 130 is a run that was stopped on request, and has saved.
    ((stopped)) && exit 130
    ((status == 0 || status == 130 || status == 2 || attempt >= ${RESTARTS:-0})) && exit "$status"
    echo "attempt $((attempt + 1)) ended with $status: waiting for all hosts, then continuing" >&2
    until answer; do sleep 10; done
done
