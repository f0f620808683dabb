#!/usr/bin/env bash
# Runs the tests with the oldest Python and the lowest versions of the requirements, then with the
# newest Python and the newest versions. Each run makes .matrix anew. Arguments are for pytest.
set -e
export OMP_NUM_THREADS=1  # as in make test
cd "$(dirname "$0")/.."
pyenv=$(pyenv root 2>/dev/null || true)

find_python() {  # prints a Python of version $1 that runs (a shim of pyenv may not), or nothing
    for python in "python$1" "$pyenv/versions/$1".*/bin/python; do
        if "$python" -c "import ensurepip" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

run_tests() {  # run_tests TITLE PYTHON REQUIREMENTS ARGUMENTS...
    echo "== $1: $("$2" --version)"
    "$2" -m venv --clear .matrix
    echo "$3" > .matrix/requirements.txt
    .matrix/bin/python -m pip install --quiet --requirement .matrix/requirements.txt
    .matrix/bin/python -m pytest -q -n 2 --dist worksteal "${@:4}"
    rm -rf .matrix  # it has 6 GB; after a failure it stays
}

count=0
for version in 3.10 3.11 3.12 3.13 3.14; do
    python=$(find_python $version)
    if [ -z "$python" ]; then
        echo "Python $version: not found"
        continue
    fi
    count=$((count + 1))
    newest=$python
    case $version in
        3.10 | 3.11 | 3.12) oldest=${oldest:-$python} ;;  # newer ones are too new for the lowest versions
    esac
done

requirements=$(cat requirements.txt tests/requirements.txt)
if [ "$oldest" ]; then
    run_tests "Lowest versions" "$oldest" "${requirements//>=/==}" "$@"
else
    echo "The lowest versions are not tested: they need Python 3.10, 3.11 or 3.12."
fi
if [ $count -gt 1 ]; then
    run_tests "Newest versions" "$newest" "$requirements" "$@"
else
    echo "The newest versions are not tested: only one Python was found, and make test uses it."
fi
