#!/usr/bin/env bash
# What tpu_pod.sh does on each worker of a TPU slice. The project lies in ~/sit_jax there; a run is in a session of its
# own, so that it outlives the connection, and leaves its process, log and exit code in ~/sit_jax/state.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tpu_worker.sh install [BUCKET ...]   make .venv from the pinned requirements and jax[tpu]; mount buckets in /gcs
       tpu_worker.sh start WORD ...         start `sit WORD ...` in the background
       tpu_worker.sh follow LINES           show the log, from +1 or its last LINES lines, until the run ends
       tpu_worker.sh status                 print `exit CODE`, `exit running`, or `exit none` if there is no run
       tpu_worker.sh stop                   stop the run after it has saved; kill it after two minutes

tpu_pod.sh calls it on the workers.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD
state=$here/state

install() {
  mkdir -p "$state"
  if ! cmp -s requirements.txt .venv/installed; then
    make_venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
      "jax[tpu]==$(sed -n 's/^jax==//p' requirements.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    cp requirements.txt .venv/installed
  fi
  local bucket
  for bucket in "$@"; do
    mount_bucket "$bucket"
  done
}

# The system's Python where it is new enough; else one that uv brings.
make_venv() {
  local python
  rm -rf .venv
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv .venv
      return
    fi
  done
  python3 -m pip install --quiet --user uv
  "$HOME/.local/bin/uv" venv --quiet --seed --python 3.12 .venv
}

mount_bucket() {
  local folder=/gcs/$1 keys=/usr/share/keyrings/cloud.google.asc
  local packages=https://packages.cloud.google.com/apt
  ! mountpoint -q "$folder" || return 0
  if ! command -v gcsfuse >/dev/null; then
    curl --fail --silent --show-error "$packages/doc/apt-key.gpg" | sudo tee "$keys" >/dev/null
    echo "deb [signed-by=$keys] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update --quiet
    sudo apt-get install --quiet --yes gcsfuse
  fi
  sudo mkdir -p "$folder"
  sudo chown "$(id -u)" "$folder"
  # Workers see at once what others write, and checkpoints' folders can be renamed.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=10000 "$1" "$folder"
}

status() {
  if [[ -f $state/exit ]]; then
    echo "exit $(<"$state/exit")"
  elif [[ -f $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null; then
    echo "exit running"
  else
    echo "exit none"
  fi
}

start() {
  if [[ $(status) == "exit running" ]]; then
    echo "tpu_worker.sh: a run is under way already" >&2
    return
  fi
  mkdir -p "$state"
  rm -f "$state/exit" "$state/pid"
  [[ ! -f $state/log ]] || mv "$state/log" "$state/log.old"
  setsid bash "$here/launch/tpu_worker.sh" hold "$@" >"$state/log" 2>&1 </dev/null &
  echo "$!" >"$state/pid"
}

# Runs sit and notes its exit code; SIGTERM is sit's business.
hold() {
  local code=0
  trap : TERM HUP
  .venv/bin/sit "$@" || code=$?
  echo "$code" >"$state/exit.part"
  mv "$state/exit.part" "$state/exit"
}

follow() {
  tail --pid="$(<"$state/pid")" --sleep-interval=0.2 -n "$1" -F "$state/log" 2>/dev/null
}

stop() {
  local pid deadline=$((SECONDS + 120))
  [[ $(status) == "exit running" ]] || return 0
  pid=$(<"$state/pid")
  kill -TERM -- "-$pid"
  while [[ $(status) == "exit running" ]]; do
    ((SECONDS < deadline)) || kill -KILL -- "-$pid"
    sleep 0.5
  done
}

case ${1:---help} in
  install | start | hold | follow | status | stop) "$@" ;;
  --help) usage ;;
  *)
    echo "tpu_worker.sh: unknown command $1; see --help" >&2
    exit 2
    ;;
esac
