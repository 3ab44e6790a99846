#!/usr/bin/env bash
# Makes the environment, or leaves it alone when it is complete.
#
#   tools/setup_env.sh [main|modern]
#
# Variables:
#   PYTHON          interpreter (default: the newest of 3.11 ... 3.8 that runs)
#   VENV            folder (default: .venv, for the modern set .venv-modern)
#   MMBASIS_WHEELS  folder with torch-<version>/mmcv-*.whl
#                   (default: ../shared/wheels)
#
# The last thing written is a stamp with a checksum of the requirements: an
# environment without it, whether half made or made by hand, is checked and
# completed.
set -euo pipefail
cd "$(dirname "$0")/.."

set_name=${1:-main}
case $set_name in
  main) venv=${VENV:-.venv} extra=(tests deploy lint) ;;
  modern) venv=${VENV:-.venv-modern} extra=(tests) ;;
  *) echo "usage: $0 [main|modern]" >&2; exit 2 ;;
esac
requirements=(requirements/{build,mmcv,$set_name}.txt)
for name in "${extra[@]}"; do requirements+=("requirements/$name.txt"); done
[ "$set_name" = modern ] && requirements+=(requirements/modern-no-deps.txt)
python=$venv/bin/python
stamp=$venv/.mmbasis-stamp
log=$venv/mmcv-build.log
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "requirements/$set_name.txt")
wheels=${MMBASIS_WHEELS:-../shared/wheels}/torch-$torch
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "[setup] $*"; }
die() { echo "[setup] error: $*" >&2; exit 1; }

checksum() {  # the folder is part of it: environments do not survive a move
  { pwd -P; cat "${requirements[@]}" setup.py; } | cksum
}

version_of() {  # prints 3.x when the interpreter runs and can make a venv
  "$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' \
    2>/dev/null
}

find_python() {
  local candidate version found=''
  local candidates=(python3.11 python3.10 python3.9 python3.8 python3 python
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.{11,10,9,8}*/bin/python)
  [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    # a pyenv shim may exist and yet not run: what counts is the answer
    version=$(version_of "$candidate") || continue
    case $version in
      3.8 | 3.9 | 3.10 | 3.11) echo "$candidate"; return ;;
      *) found+=" $candidate ($version)" ;;
    esac
  done
  die "needs Python 3.8, 3.9, 3.10 or 3.11 with the venv module (torch 2.1.2" \
    "has no builds for others), but found:${found:- none that runs}. Install" \
    "one (for example: apt install python3.11 python3.11-venv" \
    "python3.11-dev, or pyenv install 3.11) or name it: PYTHON=/path make ..."
}

pip_install() { "$python" -m pip install -qq "$@"; }

pins() {  # the lines of a requirements file that start with these names
  local file=$1; shift
  local name
  for name in "$@"; do grep "^$name[=<>]" "$file" || true; done
}

mmcv_works() { "$python" -c 'import mmcv.ops' >/dev/null 2>&1; }

install_wheel() {  # mmcv from the wheels at hand, else OpenMMLab's index
  local kind=cpu
  [ ! -d "$wheels" ] || binary_mmcv --find-links "$wheels" || true
  if ! mmcv_works && [ "$set_name" = main ]; then
    command -v nvidia-smi >/dev/null && kind=cu121
    binary_mmcv --retries 1 --timeout 10 --find-links \
      "https://download.openmmlab.com/mmcv/dist/$kind/torch2.1.0/index.html"
  fi
  mmcv_works
}

binary_mmcv() {
  pip_install --only-binary mmcv --force-reinstall --no-deps "$@" \
    -r requirements/mmcv.txt 2>/dev/null
}

compile_mmcv() {
  command -v c++ >/dev/null || command -v g++ >/dev/null ||
    die "mmcv has no prebuilt wheel here and must be compiled, which needs a" \
      "C++ compiler (for example: apt install g++)"
  "$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    die "compiling mmcv needs Python.h (for example: apt install" \
      "python3.11-dev)"
  say "no wheel of mmcv for torch $torch: compiling it on $(nproc) cores," \
    "about 13 minutes on two; log in $log"
  local start=$SECONDS job tick=0
  set -m  # a process group of its own, so that all compilers end with it
  MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$(nproc) "$python" -m pip install \
    --verbose --no-build-isolation --force-reinstall --no-deps \
    --no-binary mmcv -r requirements/mmcv.txt >"$log" 2>&1 &
  job=$!
  set +m
  trap 'kill -- "-$job" 2>/dev/null || true' EXIT
  while kill -0 "$job" 2>/dev/null; do
    sleep 2
    tick=$((tick + 1))
    [ $((tick % 15)) -ne 0 ] || say "mmcv: $(built "$log"), minute" \
      "$(((SECONDS - start) / 60 + 1)) of about 13"
  done
  trap - EXIT
  wait "$job" || { tail -n 30 "$log" >&2; die "compiling mmcv failed: $log"; }
  mmcv_works || die "mmcv was compiled but its ops do not import: $log." \
    "If pip had kept a build for another torch: pip cache remove mmcv"
}

built() {  # how far ninja has come, from its log
  grep -oE '\[[0-9]+/[0-9]+\]' "$1" | tail -n 1 | tr -d '[]' |
    grep . || echo preparing
}

install_all() {
  local core
  # before mmcv: its setup.py imports torch and setuptools, and mmcv itself,
  # which is tried below, imports mmengine
  mapfile -t core < <(pins "requirements/$set_name.txt" \
    torch torchvision numpy mmengine opencv-python matplotlib rich)
  say "installing torch $torch (1 of 4, a minute or more)"
  pip_install "${core[@]}" -r requirements/build.txt
  if [ "$set_name" = modern ]; then
    pip_install --no-deps -r requirements/modern-no-deps.txt
  fi
  say 'installing mmcv with its ops (2 of 4)'
  if ! mmcv_works || ! satisfied requirements/mmcv.txt; then
    install_wheel || {
      [ "$set_name" = main ] || die "no wheel of mmcv for torch $torch in" \
        "$wheels (MMBASIS_WHEELS): the modern set is only set up with one"
      compile_mmcv
    }
  fi
  say 'installing the other requirements (3 of 4)'
  local files=(-r "requirements/$set_name.txt") name
  for name in "${extra[@]}"; do files+=(-r "requirements/$name.txt"); done
  pip_install "${files[@]}"
  say 'installing mmbasis (4 of 4)'
  pip_install --no-deps --no-build-isolation -e .
}

satisfied() {  # are the versions that these files ask for installed?
  "$python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:
    from pkg_resources import Requirement

for path in sys.argv[1:]:
    for line in open(path):
        line = line.split('#')[0].strip()
        if not line:
            continue
        want = Requirement(line)
        if want.marker is not None and not want.marker.evaluate():
            continue
        try:
            have = version(getattr(want, 'name', None) or want.project_name)
        except PackageNotFoundError:
            have = None
        if have is None or not want.specifier.contains(have.split('+')[0]):
            sys.exit('%s: %s asks for %s' % (want.name, path, want) +
                     ', installed is %s' % have)
PYTHON
}

works() {
  satisfied "${requirements[@]}" &&
    "$python" -W ignore -c 'import mmcv.ops, mmpretrain, mmdet, mmbasis'
}

main() {
  if [ -x "$python" ] && "$python" -c '' 2>/dev/null; then
    [ "$(cat "$stamp" 2>/dev/null)" = "$(checksum)" ] && return
    if works 2>/dev/null; then
      say "$venv holds all requirements already"
      checksum >"$stamp"
      return
    fi
    say "completing $venv"
    rm -f "$stamp"
  else
    local chosen
    chosen=$(find_python)
    say "making $venv with $chosen ($("$chosen" -V))"
    "$chosen" -m venv --clear "$venv"
  fi
  install_all
  works || die "$venv is not complete; see above"
  checksum >"$stamp"
  say "$venv is ready"
}

# one at a time: a second make waits for the first
if command -v flock >/dev/null; then
  exec 9>"${TMPDIR:-/tmp}/mmbasis-setup-$(pwd -P | cksum | cut -d' ' -f1).lock"
  flock 9
fi
main
