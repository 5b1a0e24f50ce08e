#!/usr/bin/env bash
# Installs saebench and runs its suite on each Python named, or on every supported one at hand,
# in an environment of its own under .matrix/.
set -uo pipefail
cd "$(dirname "$0")/.."

at_hand() { # the interpreter of a version: on the path, or among pyenv's
    local python
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        "$python" -c '' 2>/dev/null && command -v "$python" && return
    done
}

pythons=("$@")
if [ $# -eq 0 ]; then
    for version in 3.11 3.12 3.13; do
        python=$(at_hand "$version")
        [ -n "$python" ] && pythons+=("$python") || echo "Python $version is not at hand"
    done
fi
failed=0
for python in "${pythons[@]}"; do
    version=$("$python" -c 'import platform; print(platform.python_version())') || exit 2
    environment=.matrix/$version
    "$python" -m venv "$environment" &&
        "$environment/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]" &&
        "$environment/bin/pytest" --numprocesses logical --maxprocesses 4 --dist worksteal && outcome=passed || { outcome=failed; failed=1; }
    echo "Python $version with torch $("$environment/bin/python" -c 'import torch; print(torch.__version__)'): $outcome"
done
exit "$failed"
