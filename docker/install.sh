#!/bin/sh
# The steps of the Dockerfile's build stages. Run in the repository: VENV=DIR docker/install.sh STEP
#   packages    everything in uv.lock, into a new environment VENV; TORCH_INDEX: index with other builds of torch
#   project     selora itself
#   server      what the MLflow server needs in addition: PostgreSQL, S3, users
#   operators   DeepSpeed's CUDA operators, into VENV/operators (needs nvcc)
set -eu
: "${VENV:?names the environment}"
python=${PYTHON:-python3}

requirements() {
    # Without the project, which is a separate step. CUDA's packages belong only to the CUDA build of torch.
    uv export --frozen --no-default-groups --no-emit-project --no-hashes --no-header --no-annotate "$@" --output-file "$VENV.txt" >/dev/null
    if [ -n "${TORCH_INDEX:-}" ]; then sed -i -E '/^(nvidia-|cuda-|triton)/d' "$VENV.txt"; fi
}

case ${1:?names the step} in
packages)
    uv venv --quiet --python "$python" "$VENV"
    requirements --extra s3 --extra gcs # shards from object stores
    # Versions are exact, so every index gives the same release.
    uv pip install --quiet --python "$VENV/bin/python" --requirement "$VENV.txt" \
        ${TORCH_INDEX:+--index "$TORCH_INDEX" --index-strategy unsafe-best-match}
    rm "$VENV.txt"
    ;;
project)
    uv pip install --quiet --python "$VENV/bin/python" --no-deps .
    "$VENV/bin/selora" --version
    ;;
server)
    requirements --only-group server
    uv pip install --quiet --python "$VENV/bin/python" --requirement "$VENV.txt"
    rm "$VENV.txt"
    ;;
operators)
    TORCH_EXTENSIONS_DIR=$VENV/operators "$VENV/bin/python" -c '
from deepspeed.ops.op_builder import FusedAdamBuilder, UtilsBuilder
for builder in (UtilsBuilder(), FusedAdamBuilder()):
    builder.jit_load(verbose=False)
    print("built", builder.name)'
    ;;
*)
    echo "$1: no such step" >&2
    exit 2
    ;;
esac
