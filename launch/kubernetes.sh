#!/usr/bin/env bash
# Starts a run on Kubernetes: fills launch/kubernetes.yaml in and applies it; launch/README.md explains.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/commands.sh
source "$root/launch/commands.sh"

usage() {
  cat <<'TEXT'
Usage: launch/kubernetes.sh --image IMAGE --config FILE --workdir FOLDER [--config.KEY=VALUE ...] [options]

Fills in launch/kubernetes.yaml and applies it with kubectl: one pod per machine, each with all its GPUs or TPU chips.

  --image IMAGE          image that launch/image.sh built and pushed
  --config FILE          config file in the image
  --workdir FOLDER       run folder: below /data, or below /gcs/BUCKET with --bucket
  --config.KEY=VALUE     any config value
  --name NAME            name of the job (sit)
  --namespace NAME       namespace; that of kubectl if not given
  --workers N            number of pods (1)
  --gpus N               GPUs per pod (8); 0 for none
  --tpu TYPE             on GKE: TPU type, instead of GPUs, such as tpu-v5-lite-podslice
  --topology SHAPE       on GKE: TPU topology, such as 4x4
  --chips N              on GKE: TPU chips per pod (4)
  --claim NAME           PersistentVolumeClaim to mount in /data, writable by all nodes (sit-data)
  --bucket BUCKET        on GKE: mount this Cloud Storage bucket in /gcs/BUCKET instead
  --account NAME         on GKE: Kubernetes service account that may write to the bucket (sit)
  --dry-run              print the command and the manifest, and run nothing
  --help
TEXT
}

image='' name=sit namespace='' workers=1 gpus=8 tpu='' topology='' chips=4 claim=sit-data bucket='' account=sit

read_options() {
  while (($#)); do
    taken=1
    case $1 in
      --image | --image=*) option_value "$@" && image=$value ;;
      --name | --name=*) option_value "$@" && name=$value ;;
      --namespace | --namespace=*) option_value "$@" && namespace=$value ;;
      --workers | --workers=*) option_value "$@" && workers=$value ;;
      --gpus | --gpus=*) option_value "$@" && gpus=$value ;;
      --tpu | --tpu=*) option_value "$@" && tpu=$value ;;
      --topology | --topology=*) option_value "$@" && topology=$value ;;
      --chips | --chips=*) option_value "$@" && chips=$value ;;
      --claim | --claim=*) option_value "$@" && claim=$value ;;
      --bucket | --bucket=*) option_value "$@" && bucket=${value#gs://} ;;
      --account | --account=*) option_value "$@" && account=$value ;;
      --dry-run) dry_run=1 ;;
      --help) usage && exit 0 ;;
      *) run_option "$@" ;;
    esac
    shift "$taken"
  done
}

check_options() {
  local option name_like='^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$' mount=/data
  check_run
  [[ -n $image ]] || die "--image is missing; launch/image.sh builds one"
  [[ $image =~ ^[A-Za-z0-9._:/@-]+$ ]] || die "--image: '$image' is not the name of an image"
  [[ $name =~ ^[a-z]([a-z0-9-]{0,50}[a-z0-9])?$ ]] || die "--name: small letters, digits and hyphens, not '$name'"
  for option in claim account ${namespace:+namespace} ${bucket:+bucket} ${tpu:+tpu} ${topology:+topology}; do
    [[ ${!option} =~ $name_like ]] || die "--$option: small letters, digits, hyphens and dots, not '${!option}'"
  done
  check_number --workers "$workers" 1
  check_number --gpus "$gpus" 0
  check_number --chips "$chips" 1
  [[ -z $tpu || -n $topology ]] || die "--topology is missing: the shape of the TPU slice, such as 4x4"
  [[ -n $tpu || -z $topology ]] || die "--topology goes with --tpu"
  [[ -z $bucket ]] || mount=/gcs/$bucket
  [[ $workdir == "$mount"/* ]] || die "--workdir: $workdir is not below $mount, which is what the pods share"
  ((dry_run)) || command -v kubectl >/dev/null || die "kubectl is not installed: https://kubernetes.io/docs/tasks/tools"
}

# Prints the words of `sit train` as items of a YAML list, in double quotes. Kubernetes must not expand `$(NAME)` in them.
print_words() {
  local word
  train_words
  for word in "${words[@]}"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//\$(/\$\$(}
    printf '%s- "%s"\n' "$1" "$word"
  done
}

# Sets `text`, a line of the manifest, to what the options say; `marks` are the options that it depends on.
fill_line() {
  local mark
  for mark in $marks; do
    case $mark in
      --name) text=${text%sit}$name ;;
      --coordinator) text=${text/sit-0.sit/$name-0.$name} ;;
      --workers) text=${text/2/$workers} ;;
      --gpus) text=${text/gpu: 8/gpu: $gpus} ;;
      --chips) text=${text/tpu: 4/tpu: $chips} ;;
      --image) text=${text/sit_jax:cuda13/$image} ;;
      --tpu) text=${text/tpu-v5-lite-podslice/$tpu} ;;
      --topology) text=${text/4x4/$topology} ;;
      --account) text=${text/: sit/: $account} ;;
      --claim) text=${text/sit-data/$claim} ;;
      --bucket) text=${text/my-bucket/$bucket} ;;
      --mount) [[ -z $bucket ]] || text=${text/\/data/\/gcs\/$bucket} ;;
    esac
  done
}

print_manifest() {
  local text marks words_printed=0
  while IFS= read -r text; do
    case $text in
      *'#tpu# '*)
        [[ -n $tpu ]] || continue
        text=${text/'#tpu# '/}
        ;;
      *'#bucket# '*)
        [[ -n $bucket ]] || continue
        text=${text/'#bucket# '/}
        ;;
    esac
    marks=''
    if [[ $text == *' # --'* ]]; then
      marks=${text##* # }
      text=${text% # *}
    fi
    case $marks in
      *--words*)
        ((words_printed)) || print_words "${text%%-*}"
        words_printed=1
        continue
        ;;
      *--gpus*) [[ -z $tpu ]] || continue ;;
      *--claim*) [[ -z $bucket ]] || continue ;;
    esac
    fill_line
    printf '%s\n' "$text"
  done <launch/kubernetes.yaml
}

cd "$root"
read_options "$@"
check_options
command=(kubectl apply)
[[ -z $namespace ]] || command+=("--namespace=$namespace")
command+=(--filename=-)
if ((dry_run)); then
  printf "%s <<'END'\n%s\nEND\n" "$(quote "${command[@]}")" "$(print_manifest)"
else
  print_manifest | "${command[@]}"
  say "the log: kubectl logs --follow job/$name; the end: kubectl delete job,service $name"
fi
