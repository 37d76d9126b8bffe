# Sourced by the other scripts: creates a virtual environment in .venv with the pinned requirements,
# once. VENV=none uses the `python` on the PATH as it is, e.g. on a machine without network that has
# the packages.
# Ctrl-C also ends background jobs, which bash starts with SIGINT ignored. Runs save first.
trap 'trap "" INT TERM; kill 0; wait; exit 130' INT
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
[ "${VENV:-}" != none ] || return 0
if [ ! -f .venv/ready ] || [ requirements.txt -nt .venv/ready ]; then
  echo "== installing into .venv (once)"
  "${PYTHON:-python3}" -m venv .venv
  install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  # torch first, so that other packages do not replace a build chosen by the user's pip settings
  "${install[@]}" "$(grep '^torch==' requirements.txt)"
  "${install[@]}" -r requirements.txt
  touch .venv/ready
fi
source .venv/bin/activate
