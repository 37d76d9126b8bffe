#!/usr/bin/env bash
# The test suite from a bare machine: virtual environment, requirements, ruff, pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
ruff check .
python -m pytest "$@"
