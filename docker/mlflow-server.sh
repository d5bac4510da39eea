#!/bin/sh
# The MLflow server of compose.yaml and launch/kubernetes/mlflow.yaml: PostgreSQL for records, S3 for files, users and
# passwords. Expects POSTGRES_PASSWORD, MLFLOW_ADMIN_PASSWORD, MLFLOW_FLASK_SERVER_SECRET_KEY and, for the object
# store, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_S3_ENDPOINT_URL.
set -eu
umask 077
database="postgresql+psycopg2://mlflow:${POSTGRES_PASSWORD:?}@${POSTGRES_HOST:-postgres}:5432"
# Passwords go into files and variables, because `ps` shows command lines to everyone.
export MLFLOW_AUTH_CONFIG_PATH="${HOME}/auth.ini" MLFLOW_BACKEND_STORE_URI="$database/mlflow"
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = READ
database_uri = sqlite:////${HOME}/users.db
admin_username = admin
admin_password = ${MLFLOW_ADMIN_PASSWORD:?}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
: "${MLFLOW_FLASK_SERVER_SECRET_KEY:?}"
exec mlflow server --host 0.0.0.0 --port 5000 --app-name basic-auth \
    --artifacts-destination "${ARTIFACTS:-s3://mlflow}" --serve-artifacts
