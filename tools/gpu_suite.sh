#!/usr/bin/env bash
# The GPU suite, as one command: tools/gpu_suite.sh [WHEELS] [LOG]
#
# WHEELS  folder of wheels for a machine without network; those whose package
#         is not installed are unpacked beside the tests, nothing is installed
# LOG     where the log goes (default: docs/results/gpu_suite.log)
#
# SECONDS_LIMIT is for each of both parts (default 220: eight minutes in all);
# DEVICE=cpu rehearses it without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${1:-}
log=${2:-docs/results/gpu_suite.log}
limit=${SECONDS_LIMIT:-220}
device=${DEVICE:-cuda}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# whether what is in a wheel can be imported already: mmcv-lite is not wanted
# beside mmcv, nor a fork beside what it is forked from
importable() {
  "$python" - "$1" <<'PY'
import importlib.util
import sys
import zipfile
names = {x.partition('/')[0] for x in zipfile.ZipFile(sys.argv[1]).namelist()}
names = {x[:-3] if x.endswith('.py') else x for x in names if x[-5:] != '-info'
         and x[-5:] != '.data'}
sys.exit(not any(x.isidentifier() and importlib.util.find_spec(x)
                 for x in names))
PY
}

if [ -n "$wheels" ]; then
  for wheel in "$wheels"/*.whl; do
    importable "$wheel" ||
      "$python" -m pip install --quiet --no-index --no-deps \
        --target "$site" "$wheel" || exit 1
  done
fi
# mmpretrain 1.2.0 cannot be imported beside transformers 5
if "$python" -c 'import importlib.metadata as m, sys
sys.exit(int(m.version("transformers").split(".")[0]) < 5)' 2>/dev/null; then
  echo 'raise ImportError("hidden by tools/gpu_suite.sh")' \
    > "$site/transformers.py"
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

versions() {
  "$python" - <<'PY'
import datetime
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
print('date:', datetime.datetime.now(datetime.timezone.utc).date())
print('python:', platform.python_version())
for name in ('numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'mmpretrain', 'mmdet',
             'onedl-mmengine', 'onedl-mmcv', 'onedl-mmpretrain'):
    try:
        print(f'{name}:', version(name))
    except PackageNotFoundError:
        pass
print('torch:', torch.__version__, 'CUDA', torch.version.cuda)
for i in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(i)
    print(f'GPU {i}: {card.name}, {card.total_memory / 2**30:.0f} GiB')
PY
}

# the pytest of such a machine may lack the plugins that setup.cfg asks for
part() {
  echo "\$ pytest $*"
  timeout "$limit" "$python" -m pytest -o addopts=--strict-markers \
    -p no:cacheprovider -q -rs --show-capture=no --durations=10 "$@"
  code=$?
  [ $code = 124 ] && echo "cut off after $limit s"
  return $code
}

mkdir -p "$(dirname "$log")"
{
  echo "commit: $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  versions
  part --device "$device" -m gpu tests/test_gpu
  first=$?
  part --device "$device" -m 'not slow' tests/test_hooks
  second=$?
  [ $first = 0 ] && [ $second = 0 ]
} 2>&1 | tee "$log"
exit "${PIPESTATUS[0]}"
