#!/usr/bin/env bash
# The whole pipeline in one command.
#
#   bash train.sh                              tokenizer, base policy, EG-GRPO, table and images
#   bash train.sh --preset smoke|cpu|gpu       default: gpu on CUDA, else cpu
#   bash train.sh --device cpu|cuda|mps        default: CUDA if available, else cpu
#   bash train.sh --method grpo --seed 1       another method or seed of the reinforcement learning
#   bash train.sh sample "a red circle"        any module, by the same Python: sample, evaluate,
#                                              lab.analyze, lab.bonus, ... with its own flags
#   bash train.sh study                        every method over seeds, tables and figures (hours)
#   bash train.sh test                         the tests
#
# Uses the current Python if it has the six packages, else makes .venv and installs requirements.txt
# into it. A finished stage is skipped, an interrupted one goes on.
set -euo pipefail
cd "$(dirname "$0")"

module= study= preset= device=auto shared=() method=()
usage="usage: bash train.sh [--preset smoke|cpu|gpu] [--device NAME] [--method NAME] [--seed N] [--out DIR] | bash train.sh study [--preset NAME] [--device NAME] [--out DIR] | bash train.sh MODULE [FLAGS] | bash train.sh test"
case ${1:-} in
  study) study=yes; shift ;;
  "" | -*) ;;
  *) module=$1; shift ;;
esac
while [ $# -gt 0 ] && [ -z "$module" ]; do
  case $1 in -h | --help) echo "$usage"; exit 0 ;; esac
  [ $# -ge 2 ] || { echo "error: $1 without a value; $usage" >&2; exit 2; }
  case $1 in
    --preset) preset=$2; shared+=("$1" "$2") ;;
    --device) device=$2; shared+=("$1" "$2") ;;
    --out) shared+=("$1" "$2") ;;
    --method | --seed) method+=("$1" "$2") ;;
    *) echo "error: unknown argument $1; $usage" >&2; exit 2 ;;
  esac
  shift 2
done

python=${PYTHON:-python3}
has_packages() {
  "$1" -c 'from importlib.util import find_spec as f; import sys
sys.exit(not all(map(f, "torch numpy PIL tqdm matplotlib pytest".split())))' 2>/dev/null
}
if ! has_packages "$python"; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  python=.venv/bin/python
  if ! has_packages "$python"; then
    echo "installing requirements.txt into .venv ..."
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  fi
fi

case $module in
  "") ;;
  test) exec "$python" -m pytest "$@" ;;
  *) exec "$python" -m "$module" "$@" ;;
esac
if [ "$study" ]; then
  [ ${#method[@]} -eq 0 ] || { echo "error: a study runs all methods and seeds; $usage" >&2; exit 2; }
  "$python" -m lab.study ${shared[@]+"${shared[@]}"}
  exec "$python" -m lab.analyze ${shared[@]+"${shared[@]}"}
fi

[ "$preset" ] || preset=$("$python" -c 'import sys, common; print(common.default_preset(sys.argv[1]))' "$device")
stage() {  # number, title, minutes on two CPU cores with preset cpu
  local time="about $3 on two CPU cores"
  case $preset in smoke) time="a few seconds" ;; gpu) time="time not measured yet" ;; esac
  echo "stage $1 of 4: $2 ($time)"
}
stage 1 "tokenizer" "half a minute"
"$python" -m tiny_vq.train ${shared[@]+"${shared[@]}"}
stage 2 "base policy" "3 minutes"
"$python" pretrain.py ${shared[@]+"${shared[@]}"}
stage 3 "reinforcement learning" "3 minutes"
"$python" eggrpo.py ${shared[@]+"${shared[@]}"} ${method[@]+"${method[@]}"}
stage 4 "evaluation" "half a minute"
"$python" evaluate.py ${shared[@]+"${shared[@]}"}
