# shellcheck shell=bash
# What the launch scripts share: how they read the run's options, and how they run commands or print them.
# It is sourced, and keeps to what bash 3.2 knows, since laptops still have that.
# shellcheck disable=SC2034,SC2154 # Who sources it uses and sets the rest.

# The exit codes of `sit train`.
readonly MISTAKE=2 STOPPED=75

dry_run=0
config=''
workdir=''
overrides=()

# Ends the script for a user's mistake, with one line.
die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "$MISTAKE"
}

# Tells what happens; standard output is left to the commands of a dry run.
say() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
}

# Prints words so that a shell reads the same words back.
quote() {
  local word text='' apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word=\'${word//$apostrophe/$escaped}\'
    fi
    text="$text $word"
  done
  printf '%s\n' "${text# }"
}

# Runs a command; in a dry run prints it.
run() {
  if ((dry_run)); then
    quote "$@"
  else
    "$@"
  fi
}

# The value of an option, given as `--option value` or `--option=value`; sets `value` and `taken`, the words used up.
option_value() {
  case $1 in
    *=*) value=${1#*=} taken=1 ;;
    *)
      (($# >= 2)) || die "$1 needs a value"
      value=$2 taken=2
      ;;
  esac
  [[ -n $value ]] || die "${1%%=*} needs a value"
}

# Takes an option of `sit train`; ends the script if the option is unknown.
run_option() {
  case $1 in
    --config.*=*) overrides+=("$1") taken=1 ;;
    --config.*) die "$1: write --config.KEY=VALUE in one word" ;;
    --config | --config=*) option_value "$@" && config=$value ;;
    --workdir | --workdir=*) option_value "$@" && workdir=$value ;;
    *) die "unknown option $1; see --help" ;;
  esac
}

# Ends the script unless the run's options make sense.
check_run() {
  local word
  [[ -n $config ]] || die "--config is missing: the config file, such as configs/imagenet_sit_small.py"
  [[ -n $workdir ]] || die "--workdir is missing: the run folder, on a disk that all processes see"
  [[ -f $config || -f ${config%:*} ]] || die "--config: there is no file ${config%:*}"
  for word in "$workdir" "${overrides[@]+"${overrides[@]}"}"; do
    [[ $word != *gs://* ]] ||
      die "$word: sit reads and writes files; mount the bucket and name the folder (launch/README.md, Cloud Storage)"
  done
}

# Ends the script unless an option's value is an integer of at least the given one.
check_number() {
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
    die "$1: must be an integer of at least $3, got $2"
  fi
}

# Sets `words` to what is to be trained; --resume is right for a first start as well.
train_words() {
  words=(train --config "$config" --workdir "$workdir" --resume "${overrides[@]+"${overrides[@]}"}")
}

# Whether to start again after an exit code: always if the run was preempted, after a crash while tries are left.
# Takes the code and whether this script was stopped by a signal.
start_again() {
  case $1 in
    0 | "$MISTAKE") return 1 ;;
    "$STOPPED")
      (($2)) && return 1
      say "the run stopped and saved its state; it is resumed"
      ;;
    *)
      (($2)) && return 1
      if ((tries_left <= 1)); then
        say "the run ended with exit code $1; no tries are left"
        return 1
      fi
      tries_left=$((tries_left - 1))
      say "the run ended with exit code $1; it starts again from its newest checkpoint, tries left: $tries_left"
      run sleep "$pause"
      ;;
  esac
}
