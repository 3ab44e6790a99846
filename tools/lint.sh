#!/usr/bin/env bash
# The checks of .pre-commit-config.yaml, without git hooks and without network;
# runs them all, and fails when one did.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
failed=()

check() {
  local name=$1; shift
  echo "[lint] $name"
  "$@" || failed+=("$name")
}

check ruff "$bin/ruff" check --quiet --output-format concise "$@"
check mypy "$bin/mypy" --no-error-summary
check codespell "$bin/codespell" "$@" README.md CHANGELOG.md \
  CONTRIBUTING.md Makefile requirements .github
check 'Python 3.8' "$bin/vermin" -t=3.8- --no-tips --violations --quiet "$@"

if [ ${#failed[@]} -gt 0 ]; then
  echo "[lint] failed: ${failed[*]}" >&2
  exit 1
fi
echo '[lint] clean'
