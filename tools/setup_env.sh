#!/usr/bin/env bash
# Makes the environment, or leaves it alone when it is complete.
#
#   tools/setup_env.sh [main|modern|forks]
#   tools/setup_env.sh which    prints the set that `make` takes by default:
#                               forks where Python 3.12 runs, else main
#
# Variables:
#   PYTHON          interpreter (default: 3.12 for the forks, for the others
#                   the newest of 3.11 ... 3.8 that runs)
#   VENV            folder (default: .venv for main, else .venv-<set>)
#   MMBASIS_WHEELS  folder with torch-<version>/*mmcv-*.whl
#                   (default: ../shared/wheels)
#
# The last thing written is a stamp with a checksum of the requirements: an
# environment without it, whether half made or made by hand, is checked and
# completed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "[setup] $*"; }
die() { echo "[setup] error: $*" >&2; exit 1; }

version_of() {  # prints 3.x when the interpreter runs and can make a venv
  "$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' \
    2>/dev/null
}

interpreter() {  # the first that has one of these versions, "3.11 3.10"
  local candidate version found=''
  local candidates=()
  for version in $1; do
    candidates+=("python$version"
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python)
  done
  candidates+=(python3 python)
  [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    # a pyenv shim may exist and yet not run: what counts is the answer
    version=$(version_of "$candidate") || continue
    case " $1 " in
      *" $version "*) echo "$candidate"; return ;;
      *) found+=" $candidate ($version)" ;;
    esac
  done
  echo "${found:- none that runs}"
  return 1
}

set_name=${1:-main}
mmcv=mmcv pythons='3.11 3.10 3.9 3.8' no_deps=()
case $set_name in
  which) interpreter 3.12 >/dev/null && echo forks || echo main; exit ;;
  main) venv=${VENV:-.venv} extra=(tests deploy lint) ;;
  modern) venv=${VENV:-.venv-modern} extra=(tests) no_deps=(modern-no-deps) ;;
  forks)
    venv=${VENV:-.venv-forks} extra=(tests lint) no_deps=(forks-no-deps)
    mmcv=onedl-mmcv pythons=3.12
    ;;
  *) echo "usage: $0 [main|modern|forks|which]" >&2; exit 2 ;;
esac
mmcv_file=requirements/mmcv.txt
[ "$set_name" != forks ] || mmcv_file=requirements/forks-mmcv.txt
requirements=(requirements/{build,$set_name}.txt "$mmcv_file")
for name in "${extra[@]}" ${no_deps[@]+"${no_deps[@]}"}; do
  requirements+=("requirements/$name.txt")
done
python=$venv/bin/python
stamp=$venv/.mmbasis-stamp
log=$venv/mmcv-build.log
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "requirements/$set_name.txt")
wheels=${MMBASIS_WHEELS:-../shared/wheels}/torch-$torch
# what was compiled here once serves all environments
built=${XDG_CACHE_HOME:-$HOME/.cache}/mmbasis/wheels/torch-$torch
export PIP_DISABLE_PIP_VERSION_CHECK=1

checksum() {  # the folder is part of it: environments do not survive a move
  { pwd -P; cat "${requirements[@]}" setup.py; } | cksum
}

find_python() {
  interpreter "$pythons" && return
  local newest=${pythons%% *}
  die "the set '$set_name' needs Python ${pythons// /, } with the venv" \
    "module (torch $torch has no builds for others), but found:$(interpreter \
      "$pythons"). Install one (for example: apt install python$newest" \
    "python$newest-venv python$newest-dev, or pyenv install $newest) or name" \
    "it: PYTHON=/path make ..."
}

pip_install() { "$python" -m pip install -qq "$@"; }

pins() {  # the lines of a requirements file that start with these names
  local file=$1; shift
  local name
  for name in "$@"; do grep "^$name[=<>]" "$file" || true; done
}

mmcv_works() { "$python" -c 'import mmcv.ops' >/dev/null 2>&1; }

install_wheel() {  # mmcv from the wheels at hand, else OpenMMLab's index
  local folder kind=cpu
  for folder in "$wheels" "$built"; do
    if [ -d "$folder" ]; then
      binary_mmcv --no-index --find-links "$folder" || true
      if mmcv_works; then return; fi
    fi
  done
  if [ "$set_name" = main ]; then
    command -v nvidia-smi >/dev/null && kind=cu121
    binary_mmcv --retries 1 --timeout 10 --find-links \
      "https://download.openmmlab.com/mmcv/dist/$kind/torch2.1.0/index.html"
  fi
  mmcv_works
}

binary_mmcv() {
  pip_install --only-binary "$mmcv" --force-reinstall --no-deps "$@" \
    -r "$mmcv_file" 2>/dev/null
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
  # from pip's cache, a build of the forks' may lack the ops
  MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$(nproc) "$python" -m pip wheel \
    --verbose --no-build-isolation --no-deps --no-cache-dir \
    --no-binary "$mmcv" --wheel-dir "$built" -r "$mmcv_file" >"$log" 2>&1 &
  job=$!
  set +m
  trap 'kill -- "-$job" 2>/dev/null || true' EXIT
  while kill -0 "$job" 2>/dev/null; do
    sleep 2
    tick=$((tick + 1))
    [ $((tick % 15)) -ne 0 ] || say "mmcv: $(progress "$log"), minute" \
      "$(((SECONDS - start) / 60 + 1)) of about 13"
  done
  trap - EXIT
  wait "$job" || { tail -n 30 "$log" >&2; die "compiling mmcv failed: $log"; }
  binary_mmcv --no-index --find-links "$built" || true
  mmcv_works || die "mmcv was compiled but its ops do not import: $log." \
    "The wheel is in $built: remove it before another try"
}

progress() {  # how far ninja has come, from its log
  grep -oE '\[[0-9]+/[0-9]+\]' "$1" | tail -n 1 | tr -d '[]' |
    grep . || echo preparing
}

install_all() {
  local core name
  # before mmcv: its setup.py imports torch and setuptools, and mmcv itself,
  # which is tried below, imports mmengine
  mapfile -t core < <(pins "requirements/$set_name.txt" torch torchvision \
    numpy mmengine onedl-mmengine opencv-python matplotlib rich)
  say "installing torch $torch (1 of 4, a minute or more)"
  pip_install "${core[@]}" -r requirements/build.txt
  for name in ${no_deps[@]+"${no_deps[@]}"}; do
    pip_install --no-deps -r "requirements/$name.txt"
  done
  say 'installing mmcv with its ops (2 of 4)'
  if ! mmcv_works || ! satisfied "$mmcv_file"; then
    install_wheel || {
      [ "$set_name" != modern ] || die "no wheel of mmcv for torch $torch in" \
        "$wheels (MMBASIS_WHEELS): the modern set is only set up with one"
      compile_mmcv
    }
  fi
  say 'installing the other requirements (3 of 4)'
  local files=(-r "requirements/$set_name.txt")
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
