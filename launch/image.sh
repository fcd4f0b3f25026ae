#!/usr/bin/env bash
# Builds the image of launch/Dockerfile; launch/README.md explains.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/commands.sh
source "$root/launch/commands.sh"

usage() {
  cat <<'TEXT'
Usage: launch/image.sh [--accelerator cpu|cuda13|tpu] [--tag NAME] [--push] [--dry-run]

Builds the image of launch/Dockerfile with docker. Its command is `sit`.

  --accelerator KIND     accelerator: cpu, cuda13 (NVIDIA) or tpu (cuda13)
  --tag NAME             name of the image (sit_jax:KIND)
  --push                 push it to the registry in its name
  --dry-run              print the commands, and run nothing
  --help
TEXT
}

accelerator=cuda13 tag='' push=0
while (($#)); do
  taken=1
  case $1 in
    --accelerator | --accelerator=*) option_value "$@" && accelerator=$value ;;
    --tag | --tag=*) option_value "$@" && tag=$value ;;
    --push) push=1 ;;
    --dry-run) dry_run=1 ;;
    --help) usage && exit 0 ;;
    *) die "unknown option $1; see --help" ;;
  esac
  shift "$taken"
done
case $accelerator in
  cpu | cuda13 | tpu) ;;
  *) die "--accelerator: cpu, cuda13 or tpu, not '$accelerator'" ;;
esac
tag=${tag:-sit_jax:$accelerator}
((dry_run)) || command -v docker >/dev/null || die "docker is not installed"

cd "$root"
run docker build --file=launch/Dockerfile "--build-arg=ACCELERATOR=$accelerator" "--tag=$tag" .
((!push)) || run docker push "$tag"
