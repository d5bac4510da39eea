#!/usr/bin/env bash
# Submit a sweep to a running Ray cluster. The code is sent as a wheel, and the environment is that of uv.lock.
#
#   RAY_ADDRESS=http://HEAD:8265 RAY_AUTH_TOKEN_PATH=~/.ray/auth_token launch/ray/submit.sh CONFIG GRID [key=value ...]
#
# Needs uv and the environment of `make env` here; on the cluster, the Ray and Python of uv.lock, and `out`, shards and
# benchmark on paths that all nodes share. CONFIG and GRID are sent; paths in them are paths on the cluster. The same
# command continues the sweep. Follow it with `ray job logs --follow JOB`, end it with `ray job stop JOB` (it saves).
set -euo pipefail

[[ $# -ge 2 && -n ${RAY_ADDRESS:-} ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${SELORA_BIN:-$here/.venv/bin}
config=$(realpath "$1") grid=$(realpath "$2"); shift 2
bundle=$(mktemp -d); trap 'rm -rf "$bundle"' EXIT

uv build --project "$here" --wheel --out-dir "$bundle" >&2
# Packages that the nodes already have in the locked version are not installed again.
uv export --project "$here" --frozen --no-default-groups --no-emit-project --no-hashes --no-header --no-annotate \
    --output-file "$bundle/requirements.txt" >/dev/null
mkdir "$bundle/work"
# `base:` in a config is resolved here, so that one file is enough.
"$bin/python" - "$config" "$bundle/work/config.yaml" <<'PYTHON'
import sys
from pathlib import Path
from pipeline.config import load_config, to_yaml
Path(sys.argv[2]).write_text(to_yaml(load_config(sys.argv[1])))
PYTHON
cp "$grid" "$bundle/work/grid.yaml"

export RAY_AUTH_MODE=token
"$bin/ray" job submit --no-wait \
    --runtime-env-json "{\"working_dir\": \"$bundle/work\", \"py_modules\": [\"$(echo "$bundle"/*.whl)\"],
                         \"uv\": \"$bundle/requirements.txt\"}" \
    -- python -m pipeline sweep config.yaml grid.yaml "$@"
