#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from one's own machine; launch/README.md explains.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/commands.sh
source "$root/launch/commands.sh"

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh up --name NAME --zone ZONE --type TYPE --config FILE --workdir FOLDER
                            [--config.KEY=VALUE ...] [options]
       launch/tpu_pod.sh logs|status|stop|delete --name NAME --zone ZONE [options]

  up        create the slice, or use the existing one, install the project on all workers, start the run, and show its
            log until it ends. A run that crashed, or whose slice was preempted, is resumed, on a new slice if needed.
            Ctrl-C does not stop the run; the same command shows it again.
  logs      show the log
  status    print the state of the slice and of each worker
  stop      stop the run after it has saved
  delete    delete the slice

  --name NAME            name of the slice
  --zone ZONE            zone, such as us-west4-a
  --project PROJECT      project; that of gcloud if not given
  --type TYPE            accelerator type, such as v5litepod-16
  --version VERSION      software version of the workers; the one that Google recommends for the type if not given
  --spot                 cheaper, but may be preempted at any time
  --queued               use a queued resource, which waits for capacity; give it with all commands
  --internal-ip          workers without external addresses
  --bucket BUCKET        mount a Cloud Storage bucket in /gcs/BUCKET; may be repeated
  --config FILE          config file in the project's folder
  --workdir FOLDER       run folder that all workers see and that outlives the slice: /gcs/BUCKET/...
  --config.KEY=VALUE     any config value
  --tries N              number of starts if the run crashes (3)
  --pause SECONDS        pause before the next start after a crash (10)
  --poll SECONDS         interval of queries while the slice is not ready (20)
  --delete               delete the slice when the run is done
  --dry-run              print the commands of a successful first start, and run nothing
  --help
TEXT
}

name='' zone='' project='' type='' version='' spot=0 queued=0 internal=0 delete_after=0
tries_left=3 pause=10 poll=20
buckets=()
# Whether the slice was ready once: from then on nothing but the run's own end ends the waiting.
ever_ready=0

read_options() {
  while (($#)); do
    taken=1
    case $1 in
      --name | --name=*) option_value "$@" && name=$value ;;
      --zone | --zone=*) option_value "$@" && zone=$value ;;
      --project | --project=*) option_value "$@" && project=$value ;;
      --type | --type=*) option_value "$@" && type=$value ;;
      --version | --version=*) option_value "$@" && version=$value ;;
      --bucket | --bucket=*) option_value "$@" && buckets+=("${value#gs://}") ;;
      --tries | --tries=*) option_value "$@" && tries_left=$value ;;
      --pause | --pause=*) option_value "$@" && pause=$value ;;
      --poll | --poll=*) option_value "$@" && poll=$value ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --internal-ip) internal=1 ;;
      --delete) delete_after=1 ;;
      --dry-run) dry_run=1 ;;
      --help) usage && exit 0 ;;
      *) run_option "$@" ;;
    esac
    shift "$taken"
  done
  [[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] || die "--name: small letters, digits and hyphens, not '$name'"
  [[ -n $zone ]] || die "--zone is missing, such as us-west4-a"
  check_number --tries "$tries_left" 1
  check_number --pause "$pause" 0
  check_number --poll "$poll" 0
  ((dry_run)) || command -v gcloud >/dev/null || die "gcloud is not installed: https://cloud.google.com/sdk"
}

check_up() {
  [[ -n $type ]] || die "--type is missing, such as v5litepod-16"
  check_run
  case $config in
    /* | ../* | */../*) die "--config: $config does not lie in the project's folder, which is what workers get" ;;
  esac
  if [[ -z $version ]]; then
    case $type in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) version='tpu-ubuntu2204-base' ;;
    esac
  fi
  [[ $workdir == /* ]] || say "--workdir $workdir is on the workers' own disks, which go when the slice goes; see --bucket"
}

# Sets `place`, and `reach` for connections.
set_place() {
  place=("--zone=$zone")
  [[ -z $project ]] || place+=("--project=$project")
  reach=("${place[@]}")
  ((!internal)) || reach+=(--internal-ip)
}

# Asks gcloud; sets `answer`, to nothing where it knows no such thing, to UNKNOWN where it cannot be reached for a while.
# A dry run prints the question and assumes the first word.
ask() {
  local assumed=$1 errors
  shift
  if ((dry_run)); then
    quote "$@"
    answer=$assumed
    return
  fi
  errors=$(mktemp)
  if answer=$("$@" 2>"$errors"); then
    rm -f "$errors"
    return
  fi
  answer=''
  if ! grep -qi 'not[_ ]found' "$errors"; then
    answer=UNKNOWN
    say "$(tail -n 1 "$errors")"
  fi
  rm -f "$errors"
  [[ $answer != UNKNOWN ]] || ((ever_ready)) || exit 1
}

tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

# Sets `answer` to the state of the slice, in the words of TPU VMs; empty where there is none.
ask_state() {
  if ((queued)); then
    ask "${1:+ACTIVE}" "${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)'
    case $answer in
      '' | FAILED | UNKNOWN) return ;;
      ACTIVE) ;; # What became of it afterwards, the node knows.
      SUSPENDED) answer=PREEMPTED && return ;;
      *) answer=CREATING && return ;;
    esac
  fi
  ask "$1" "${tpu[@]}" describe "$name" "${place[@]}" '--format=value(state)'
}

create_slice() {
  local options=("${place[@]}" "--accelerator-type=$type")
  ((!spot)) || options+=(--spot)
  ((!internal)) || options+=(--internal-ips)
  if ((queued)); then
    run "${queue[@]}" create "$name" "--node-id=$name" "${options[@]}" "--runtime-version=$version"
  else
    run "${tpu[@]}" create "$name" "${options[@]}" "--version=$version"
  fi
}

delete_slice() {
  if ((queued)); then
    run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
  else
    run "${tpu[@]}" delete "$name" "${place[@]}" --quiet
  fi
}

# Waits until there is a slice that is ready; sets `created` where it is a new one.
ensure_slice() {
  local assumed='' known=''
  created=0
  while true; do
    ask_state "$assumed"
    [[ $answer == "$known" ]] || say "slice $name is ${answer:-gone}"
    known=$answer
    case $answer in
      READY) return ;;
      '')
        say "creating slice $name ($type)"
        if create_slice; then
          created=1 assumed=READY
        elif ((!ever_ready && !created)); then
          say "the slice cannot be created; where capacity is lacking, --queued waits for it"
          exit 1
        else
          sleep "$poll"
        fi
        ;;
      FAILED | PREEMPTED | TERMINATED)
        if [[ $answer == FAILED ]] && ((created && !ever_ready)); then
          say "the queued resource failed; gcloud compute tpus queued-resources describe $name says why"
          exit 1
        fi
        delete_slice || sleep "$poll"
        ;;
      STOPPED) run "${tpu[@]}" start "$name" "${place[@]}" ;;
      *) sleep "$poll" ;;
    esac
  done
}

# Calls tpu_worker.sh on a worker, or on all.
remote() {
  local worker=$1
  shift
  run "${tpu[@]}" ssh "$name" "${reach[@]}" "--worker=$worker" \
    "--command=bash sit_jax/launch/tpu_worker.sh $(quote "$@")"
}

install_and_start() {
  local unpack='mkdir -p sit_jax && tar -xzf sit_jax.tar.gz -C sit_jax' words
  run mkdir -p build &&
    run tar --exclude=__pycache__ -czf "build/$name.tar.gz" \
      sit_jax configs launch pyproject.toml setup.py requirements.txt README.md LICENSE &&
    run "${tpu[@]}" scp "build/$name.tar.gz" "$name:sit_jax.tar.gz" "${reach[@]}" --worker=all &&
    run "${tpu[@]}" ssh "$name" "${reach[@]}" --worker=all "--command=$unpack" &&
    remote all install ${buckets[@]+"${buckets[@]}"} &&
    train_words &&
    remote all start "${words[@]}"
}

# Whether one of the workers' codes is this one.
has() {
  [[ " $codes " == *" $1 "* ]]
}

# Sets `code` to what the workers' codes come to: that of a crash before all others, which follow from it.
judge() {
  local one
  for one in $codes; do
    case $one in
      0 | "$MISTAKE" | "$STOPPED" | running) ;;
      none) code=137 && return ;;
      *) code=$one && return ;;
    esac
  done
  for code in "$MISTAKE" "$STOPPED" 0 running; do
    ! has "$code" || return 0
  done
  code=unknown
}

# Asks the workers how their processes ended; sets `code` to the run's exit code, `running` or `unknown`.
collect() {
  local waited=0
  while true; do
    if ((dry_run)); then
      remote all status
      codes=0
    else
      codes=$(remote all status | sed -n 's/^exit //p' | tr '\n' ' ') || codes=''
    fi
    judge
    # Where one has ended the others follow, by themselves if all is well.
    if [[ $code == running || $code == unknown ]] || ! has running; then
      return 0
    elif ((waited >= 3)) || [[ $code != 0 && $code != "$STOPPED" ]]; then
      remote all stop || true
      return 0
    fi
    waited=$((waited + 1))
    sleep "$poll"
  done
}

# Shows the log until the run ends or the slice is gone; sets `code` as `collect` does, or to `gone`.
watch_run() {
  local lines=+1
  while true; do
    # Connections break; the run does not mind.
    remote 0 follow "$lines" || true
    collect
    [[ $code == running || $code == unknown ]] || return 0
    ask_state READY
    if [[ $answer != READY && $answer != UNKNOWN ]]; then
      code=gone
      return
    fi
    [[ $code == running ]] || say "the workers do not answer"
    lines=20
    sleep "$poll"
  done
}

up() {
  local attach=0
  ensure_slice
  ever_ready=1
  if ((!created)); then
    collect
    [[ $code != running ]] || attach=1
  fi
  while true; do
    if ((attach)) || install_and_start; then
      watch_run
    else
      code=1
    fi
    attach=0
    case $code in
      0) break ;;
      gone) say "slice $name was preempted; the run is resumed on a new one" ;;
      *) start_again "$code" 0 || leave "$code" ;;
    esac
    # What ended the run may be that the slice goes, in half a minute.
    sleep "$poll"
    ensure_slice
  done
  ((!delete_after)) || delete_slice
  leave 0
}

leave() {
  ((dry_run || (delete_after && $1 == 0))) ||
    say "slice $name still exists and costs money; launch/tpu_pod.sh delete takes --name, --zone, --project, --queued"
  exit "$1"
}

interrupted() {
  say "interrupted; the run continues: the same command shows it again, launch/tpu_pod.sh stop stops it"
  exit 130
}

# How the slice is doing.
print_status() {
  ask_state READY
  ((dry_run)) || printf 'slice %s: %s\n' "$name" "${answer:-there is none}"
  [[ $answer != READY ]] || remote all status
}

cd "$root"
verb=${1:-}
case $verb in
  up | logs | status | stop | delete) shift ;;
  --help) usage && exit 0 ;;
  *) die "say what to do: up, logs, status, stop or delete; see --help" ;;
esac
read_options "$@"
set_place
case $verb in
  up)
    check_up
    trap interrupted INT TERM
    up
    ;;
  logs) remote 0 follow +1 ;;
  status) print_status ;;
  stop) remote all stop ;;
  delete) delete_slice ;;
esac
