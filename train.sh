#!/usr/bin/env bash
# The whole pipeline in one command, from any folder.
#
#   bash train.sh                         tokenizer, base policy, EG-GRPO, GRPO, table and pictures
#   bash train.sh --preset smoke          every stage in seconds; nothing is learned
#   bash train.sh --method grpo --seed 1  one method only, another seed of reinforcement learning
#   bash train.sh --device cpu --out DIR  the device (default: CUDA if available); the folder
#   bash train.sh sample "a red circle"   any module, by the same Python: sample, evaluate,
#                                         lab.study, ... with its own flags
#   bash train.sh test                    the tests
#
# Uses the current Python if it has the packages, else makes .venv and installs requirements.txt
# into it. A finished stage is skipped, an interrupted one goes on.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
# Or idle threads take the cores of busy ones: on two cores with two other processes a step took
# twice as long without it. On an idle machine it costs a tenth.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

usage="usage: bash train.sh [--preset smoke|small|large] [--method NAME] [--seed N] [--device NAME] [--out DIR] | bash train.sh MODULE [FLAGS] | bash train.sh test"
module= preset=small shared=() methods=(eggrpo grpo) seed=()
case ${1:-} in
  -h | --help) echo "$usage"; exit 0 ;;
  "" | -*) ;;
  *) module=$1; shift ;;
esac
while [ -z "$module" ] && [ $# -gt 0 ]; do
  case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac  # --preset=smoke
  [ $# -ge 2 ] || { echo "error: $1 without a value; $usage" >&2; exit 2; }
  case $1 in
    --preset) preset=$2; shared+=("$1" "$2") ;;
    --device | --out) shared+=("$1" "$2") ;;
    --method) methods=("$2") ;;
    --seed) seed=("$1" "$2") ;;
    *) echo "error: unknown argument $1; $usage" >&2; exit 2 ;;
  esac
  shift 2
done

has_packages() {  # whether a Python has them all, and torch 2.6 or later
  "$1" - "$module" 2>/dev/null <<'END'
import sys
from importlib.metadata import version
for name in ["numpy", "pillow", "tqdm", "matplotlib"] + ["pytest"] * (sys.argv[1] == "test"):
    version(name)
sys.exit([int(part) for part in version("torch").split(".")[:2]] < [2, 6])
END
}
python=${PYTHON:-python3}
if ! has_packages "$python"; then
  if ! cmp -s requirements.txt .venv/requirements.txt; then  # none, or not installed to its end
    echo "installing requirements.txt into .venv ..."
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt
  fi
  python=.venv/bin/python
fi

case $module in
  "") ;;
  test) exec "$python" -m pytest "$@" ;;
  *) exec "$python" -m "$module" "$@" ;;
esac

# What can be known before the first stage is checked before it: flags and device.
"$python" -c 'import sys, common, eggrpo
parse = lambda: common.parse(eggrpo.Config, eggrpo.PRESETS, "", sys.argv[1:], eggrpo.METHODS)
common.run(lambda: common.pick_device(parse().device))' \
  ${shared[@]+"${shared[@]}"} --method "${methods[0]}" ${seed[@]+"${seed[@]}"}

count=$((3 + ${#methods[@]}))
number=0
stage() {  # title, minutes on two CPU cores with preset small
  number=$((number + 1))
  local time="about $2 on two CPU cores"
  case $preset in smoke) time="seconds" ;; large) time="time not measured yet" ;; esac
  echo "stage $number of $count: $1 ($time)"
}
stage "tokenizer" "a minute"
"$python" -m tiny_vq.train ${shared[@]+"${shared[@]}"}
stage "base policy" "4 minutes"
"$python" pretrain.py ${shared[@]+"${shared[@]}"}
for method in "${methods[@]}"; do
  stage "reinforcement learning, $method" "4 minutes"
  "$python" eggrpo.py ${shared[@]+"${shared[@]}"} --method "$method" ${seed[@]+"${seed[@]}"}
done
stage "evaluation" "a minute"
"$python" evaluate.py ${shared[@]+"${shared[@]}"}
