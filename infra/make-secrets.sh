#!/usr/bin/env bash
# Make the secrets of compose.yaml in infra/secrets, or in the folder given as argument. Existing secrets are kept.
set -euo pipefail
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder" # containers read the files as other users, so all may read them; the folder keeps others out
cd "$folder"
umask 022

random() { od -An -v -N24 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { # keep FILE: write stdin to FILE unless it exists
    if [ -e "$1" ]; then cat > /dev/null; else cat > "$1.partial" && mv "$1.partial" "$1"; fi
}

for name in ray_token postgres_password mlflow_admin_password mlflow_secret_key s3_key s3_secret; do
    random | keep "$name"
done
keep aws_credentials <<END
[default]
aws_access_key_id = $(cat s3_key)
aws_secret_access_key = $(cat s3_secret)
END
keep s3.json <<END
{"identities": [{"name": "attention", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$(cat s3_key)", "secretKey": "$(cat s3_secret)"}]}]}
END
keep mlflow_credentials <<END
[mlflow]
mlflow_tracking_username = admin
mlflow_tracking_password = $(cat mlflow_admin_password)
END
