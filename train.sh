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
export CALLED_FROM=$PWD  # where relative paths among the flags start
script=$0
while [ -L "$script" ]; do  # readlink -f is missing on macOS before 12.3
  cd "$(dirname "$script")"
  script=$(readlink "$(basename "$script")")
done
cd "$(dirname "$script")"
# Or idle threads take the cores of busy ones. Seconds for 20 steps of each method on two cores, idle
# and beside one busy process: like this 54 to 61 and 62, 63; if threads spin before they sleep
# (GOMP_SPINCOUNT=2000) 38 to 55 and 89, 97, or longer (10000) 41 and 164; the methods side by side
# with a thread each, as train.py runs them, 27 to 30 and 40 to 44.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

case ${1:-} in
  "" | -*) module=train ;;
  test) module=pytest; shift ;;
  *) module=$1; shift ;;
esac

has_packages() {  # whether a Python has them all, and torch 2.6 or later
  "$1" - "$module" 2>/dev/null <<'END'
import sys
from importlib.metadata import version
for name in ["numpy", "pillow", "tqdm", "matplotlib"] + ["pytest"] * (sys.argv[1] == "pytest"):
    version(name)
sys.exit([int(part) for part in version("torch").split(".")[:2]] < [2, 6])
END
}
python=${PYTHON:-python3}
if ! has_packages "$python"; then
  if ! has_packages .venv/bin/python; then  # none, not installed to its end, or its Python is gone
    echo "installing requirements.txt into .venv ..."
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  fi
  python=.venv/bin/python
fi

exec "$python" -m "$module" "$@"
