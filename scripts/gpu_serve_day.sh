#!/bin/bash
# vLLM end to end on an isolated GPU machine, in about nine minutes: tokens per second of BWLA and of bf16.
#
#   OUT=/tmp/out bash scripts/gpu_serve_day.sh [MODEL METHOD SECONDS]...     in the repository's root
#
# Needs what `scripts/gpu_prepare.py --serve` made: .gpu/bundle (vLLM), .gpu/whl_serve (this project's wheel),
# .gpu/cache.tar.xz (compiled kernels). Results: $OUT/serve_MODEL_METHOD.json each, and serve_log.txt.
# SECONDS_ALL is the time for everything, 560 by default.
set -u
end=$(( $(date +%s) + ${SECONDS_ALL:-560} ))
prepared=${PREPARED:-.gpu}
python=${PYTHON:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/bwla_serve.XXXXXX")
export OUT=${OUT:-/tmp/out} PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/cache}
mkdir -p "$OUT" "$TRITON_CACHE_DIR"
exec > >(tee "$OUT/serve_log.txt") 2>&1
left() { echo $(( end - $(date +%s) )); }

sh "$prepared/bundle/install.sh" "$work/site" "$prepared/bundle" || { echo "bundle: FAILED"; exit 1; }
. "$work/site/env.sh"
# The wheel, not a link: vLLM finds plugins by the metadata of what is installed.
"$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
  "$prepared"/whl_serve/bwla-*.whl || { echo "bwla: wheel FAILED"; exit 1; }
# Benchmarks by a link, without this directory on the path: its folder `kernels` would hide Hugging Face's package.
ln -sfn "$PWD/benchmarks" "$work/site/benchmarks"
export PYTHONSAFEPATH=1
if [ -f "$prepared/cache.tar.xz" ]; then
  tar -xJf "$prepared/cache.tar.xz" -C "$TRITON_CACHE_DIR" \
    && timeout 60 "$python" -m benchmarks.kernels.gpu_prebuild relocate || echo "cache: FAILED (kernels will be compiled)"
fi
echo "== plugin ($(left) s left)"
timeout 60 "$python" - <<'P'
import importlib.metadata as metadata
import torch
import bwla_vllm
print("bwla", metadata.version("bwla"), "vllm", metadata.version("vllm"), "plugins",
      [point.name for point in metadata.entry_points(group="vllm.general_plugins")])
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
P

# One method at a time, each in its own file: what matters first must not wait for the rest.
[ $# -gt 0 ] || set -- 32b bwla 220 32b bf16 150 8b bwla 150 8b bf16 120
while [ $# -ge 3 ]; do
  model=$1 method=$2 limit=$3
  shift 3
  if [ "$(left)" -lt 60 ]; then echo "== $model $method: no time left"; continue; fi
  [ "$limit" -gt $(( $(left) - 10 )) ] && limit=$(( $(left) - 10 ))
  echo "== $model $method (at most $limit s of $(left) s left)"
  # FlashAttention is what the bundle carries.
  timeout -k 5 "$limit" "$python" -m benchmarks.serving.gpu_serve --models "$model" --methods "$method" \
    --minutes "$("$python" -c "print(($limit - 5) / 60)")" --attention-backend FLASH_ATTN \
    --out "$OUT/serve_${model}_$method.json" || echo "== $model $method: exit $?"
done
ls -l "$OUT"
case $work in */bwla_serve.*) rm -rf "$work" ;; esac
