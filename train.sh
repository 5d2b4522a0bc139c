#!/usr/bin/env bash
# The whole pipeline in one command.
#
#   bash train.sh                                   tokenizer, base policy, EG-GRPO, table and pictures
#   bash train.sh --preset smoke|cpu|gpu            default: gpu where CUDA is there, else cpu
#   bash train.sh --method grpo --seed 1            another method or seed of the reinforcement learning
#   bash train.sh study                             every method over seeds, tables and figures (hours)
#   bash train.sh test                              the tests
#
# Uses the current Python if it has the six packages, else makes .venv and installs requirements.txt into it.
# A finished stage is skipped, an interrupted one goes on.
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
has_packages() { "$1" -c 'import torch, numpy, PIL, tqdm, matplotlib, pytest' 2>/dev/null; }
if ! has_packages "$python"; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  python=.venv/bin/python
  if ! has_packages "$python"; then
    echo "installing requirements.txt into .venv ..."
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  fi
fi

if [ "${1:-}" = test ]; then
  exec "$python" -m pytest "${@:2}"
fi

common=() method=() study=
if [ "${1:-}" = study ]; then study=yes; shift; fi
usage="usage: bash train.sh [--preset smoke|cpu|gpu] [--method NAME] [--seed N] [--out DIR] | bash train.sh study [--preset NAME] [--out DIR] | bash train.sh test"
while [ $# -gt 0 ]; do
  case $1 in -h | --help) echo "$usage"; exit 0 ;; esac
  [ $# -ge 2 ] || { echo "error: $1 without a value; $usage" >&2; exit 2; }
  case $1 in
    --preset | --out) common+=("$1" "$2") ;;
    --method | --seed) method+=("$1" "$2") ;;
    *) echo "error: unknown argument $1; $usage" >&2; exit 2 ;;
  esac
  shift 2
done

if [ "$study" ]; then
  [ ${#method[@]} -eq 0 ] || { echo "error: a study runs all methods and seeds; $usage" >&2; exit 2; }
  "$python" study.py ${common[@]+"${common[@]}"}
  exec "$python" analyze.py ${common[@]+"${common[@]}"}
fi
"$python" -m tiny_vq.train ${common[@]+"${common[@]}"}
"$python" pretrain.py ${common[@]+"${common[@]}"}
"$python" eggrpo.py ${common[@]+"${common[@]}"} ${method[@]+"${method[@]}"}
"$python" evaluate.py ${common[@]+"${common[@]}"}
