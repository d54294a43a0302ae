#!/usr/bin/env bash
# Installs each file of dist/ in an empty environment, and runs the README's program there, outside of the checkout.
# Usage: check_dist.sh PYTHON
set -euo pipefail
python=$(command -v "$1")
checkout=$(cd "$(dirname "$0")/.." && pwd)
unset PYTHONPATH
for file in "$checkout"/dist/*.whl "$checkout"/dist/*.tar.gz; do
  room=$(mktemp -d)
  "$python" -m venv "$room"
  cd "$room"
  echo "$(bin/python --version): $(basename "$file")"
  bin/python -m pip install --quiet "$file"
  bin/python -W error "$checkout/.github/check_wheel.py"
  bin/python -m pip install --quiet flax scikit-learn
  bin/python "$checkout/.github/check_tutorial.py" "$checkout/README.md"
  cd "$checkout"
  rm -r "$room"
done
