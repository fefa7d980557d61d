#!/bin/bash
# The first nine minutes on an isolated GPU machine: is it right, how fast is it, what should the table say.
#
#   OUT=/tmp/out bash scripts/gpu_day.sh [--cpu] [STEP ...]     in the repository's root
#
# Needs python3 with torch and Triton. What scripts/gpu_prepare.py made is used where it is: .gpu/whl (packages that
# such a machine lacks) and .gpu/cache.tar.xz (compiled kernels). Results: at most eight files in $OUT (docs/benchmarks/gpu.md).
# SECONDS_ALL is the time for everything, 520 by default.
set -u
end=$(( $(date +%s) + ${SECONDS_ALL:-520} ))
prepared=${PREPARED:-.gpu}
python=${PYTHON:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/bwla_day.XXXXXX")
export OUT=${OUT:-/tmp/out} PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/cache}
mkdir -p "$OUT" "$work/site" "$TRITON_CACHE_DIR"
exec > >(tee "$OUT/log.txt") 2>&1

# The project under its installed names, without building a wheel here.
for pair in bwla_kernels:kernels bwla_converter:converter bwla_vllm:bwla_vllm benchmarks:benchmarks; do
  ln -sfn "$PWD/${pair#*:}" "$work/site/${pair%%:*}"
done
# Without this directory on the path: its folder `kernels` would hide Hugging Face's package of that name.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
if ls "$prepared"/whl/*.whl >/dev/null 2>&1; then
  timeout 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$prepared"/whl/*.whl || echo "wheels: FAILED (gpu_day.py itself needs none of them)"
fi
if [ -f "$prepared/cache.tar.xz" ]; then
  # Triton lists a kernel's files by absolute paths, and compiles anew where one does not exist: `relocate`.
  tar -xJf "$prepared/cache.tar.xz" -C "$TRITON_CACHE_DIR" \
    && timeout 60 "$python" -m benchmarks.kernels.gpu_prebuild relocate || echo "cache: FAILED (kernels will be compiled)"
fi

"$python" -m benchmarks.kernels.gpu_day --out "$OUT" --seconds $(( end - $(date +%s) )) "$@"
"$python" -m benchmarks.kernels.gpu_report "$OUT" || echo "report: FAILED"
ls -l "$OUT"
case $work in */bwla_day.*) rm -rf "$work" ;; esac
