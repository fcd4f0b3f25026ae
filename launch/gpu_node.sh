#!/usr/bin/env bash
# Trains on the GPUs of one machine; launch/README.md explains.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/commands.sh
source "$root/launch/commands.sh"

usage() {
  cat <<'TEXT'
Usage: launch/gpu_node.sh --config FILE --workdir FOLDER [--config.KEY=VALUE ...] [options]

Trains on the GPUs of this machine, with one process for all GPUs or one per GPU. A run that was preempted or crashed
is resumed; one with an error in its configuration is not. SIGTERM and Ctrl-C stop the run after it has saved.

  --config FILE          config file
  --workdir FOLDER       run folder
  --config.KEY=VALUE     any config value
  --per-gpu              one process per GPU, instead of one for all
  --gpus N               number of GPUs; all in CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists, if not given
  --port N               port of process 0 (12345)
  --tries N              number of starts if the run crashes (3)
  --pause SECONDS        pause before the next start after a crash (10)
  --grace SECONDS        time to save after a signal, before the processes are killed (120)
  --sit COMMAND          command to start; .venv/bin/sit here, or sit, if not given
  --dry-run              print the commands of the first start, and run nothing
  --help
TEXT
}

per_gpu=0 gpus='' port=12345 tries_left=3 pause=10 grace=120 sit=''

read_options() {
  while (($#)); do
    taken=1
    case $1 in
      --per-gpu) per_gpu=1 ;;
      --gpus | --gpus=*) option_value "$@" && gpus=$value ;;
      --port | --port=*) option_value "$@" && port=$value ;;
      --tries | --tries=*) option_value "$@" && tries_left=$value ;;
      --pause | --pause=*) option_value "$@" && pause=$value ;;
      --grace | --grace=*) option_value "$@" && grace=$value ;;
      --sit | --sit=*) option_value "$@" && sit=$value ;;
      --dry-run) dry_run=1 ;;
      --help) usage && exit 0 ;;
      *) run_option "$@" ;;
    esac
    shift "$taken"
  done
  check_run
  [[ -z $gpus ]] || check_number --gpus "$gpus" 1
  check_number --port "$port" 1
  check_number --tries "$tries_left" 1
  check_number --pause "$pause" 0
  check_number --grace "$grace" 1
  if [[ -z $sit ]]; then
    sit=sit
    [[ ! -x $root/.venv/bin/sit ]] || sit=$root/.venv/bin/sit
  fi
  command -v "$sit" >/dev/null || die "--sit: there is no command $sit"
}

# Sets `devices` to the GPUs' numbers, or names.
find_gpus() {
  local list
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
    [[ -z $gpus ]] || ((gpus <= ${#devices[@]})) ||
      die "--gpus: there are ${#devices[@]} in CUDA_VISIBLE_DEVICES, not $gpus"
    [[ -z $gpus ]] || devices=("${devices[@]:0:gpus}")
    return
  fi
  if [[ -z $gpus ]]; then
    list=$(nvidia-smi --list-gpus 2>/dev/null) || die "nvidia-smi lists no GPUs here; say how many with --gpus"
    gpus=$(grep -c '^GPU ' <<<"$list") || die "nvidia-smi lists no GPUs here; say how many with --gpus"
  fi
  # shellcheck disable=SC2207
  devices=($(seq 0 $((gpus - 1))))
}

# Starts a command in the background; in a dry run prints it.
start() {
  if ((dry_run)); then
    quote "$@"
  else
    "$@" &
    running+=("$!")
  fi
}

start_processes() {
  local index count=${#devices[@]}
  running=()
  train_words
  if ((!per_gpu)); then
    start env "CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${devices[*]}")" "$sit" "${words[@]}"
    return
  fi
  for index in "${!devices[@]}"; do
    start env "CUDA_VISIBLE_DEVICES=${devices[index]}" "$sit" "${words[@]}" \
      --coordinator "localhost:$port" --num_processes "$count" --process_id "$index"
  done
}

# Tells all processes to end.
signal_all() {
  ((!${#running[@]})) || kill "-$1" "${running[@]}" 2>/dev/null || true
}

# Waits for the processes; sets `code` to the exit code of the first that failed, or 0. When one ends, the others must
# follow: those of a stopped run save together, those of a crashed one have nothing left to save.
wait_for_processes() {
  local pid status still deadline=0
  code=0
  while ((${#running[@]})); do
    sleep 0.2
    still=()
    for pid in "${running[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        still+=("$pid")
        continue
      fi
      status=0
      wait "$pid" || status=$?
      ((status == 0 || code != 0)) || code=$status
    done
    running=("${still[@]+"${still[@]}"}")
    if ((asked && !deadline)); then
      deadline=$((SECONDS + grace))
    elif ((code == STOPPED && !deadline)); then
      deadline=$((SECONDS + grace))
    elif ((code != 0 && code != STOPPED && !crashed)); then
      crashed=1 deadline=$((SECONDS + 5))
      signal_all TERM
    fi
    if ((deadline && SECONDS >= deadline)); then
      signal_all KILL
    fi
  done
  # Told to end before it knew what to do then: there was nothing to save.
  ((!asked || code != 143)) || code=$STOPPED
}

asked=0 crashed=0 running=()
told_to_end() {
  ((!asked)) || signal_all KILL
  asked=1
  say "stopping: waiting for the run to save (a second signal kills it)"
  signal_all TERM
}

read_options "$@"
find_gpus
trap told_to_end TERM INT
while true; do
  crashed=0
  start_processes
  ((!dry_run)) || exit 0
  wait_for_processes
  start_again "$code" "$asked" || exit "$code"
done
