#!/bin/sh
# Unpack the vLLM bundle on the isolated GPU machine:
#   sh install.sh [TARGET] [PARTS_DIR]     then:  . TARGET/env.sh
# TARGET is where the packages go; PARTS_DIR holds the bundle.tar.xz.* parts (default: beside this script).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-${TMPDIR:-/tmp}/site}
parts=${2:-$here}
parts=$(cd "$parts" && pwd)
(cd "$parts" && sha256sum --quiet -c "$here/SHA256SUMS")
mkdir -p "$target"
target=$(cd "$target" && pwd)
python3 - "$target" "$parts"/bundle.tar.xz.* <<'PY'
import subprocess, sys, tarfile
# "cat" joins the parts; the stream is unpacked as it arrives.
with subprocess.Popen(["cat", *sorted(sys.argv[2:])], stdout=subprocess.PIPE) as cat:
    with tarfile.open(fileobj=cat.stdout, mode="r|xz") as tar:
        tar.extractall(sys.argv[1], filter="data")
PY
cat >"$target/env.sh" <<ENV
export PYTHONPATH="$target\${PYTHONPATH:+:\$PYTHONPATH}"
export PATH="$target/bin:\$PATH"
@EXPORTS@
ENV
. "$target/env.sh"
python3 -m compileall -q -j 0 "$target" >/dev/null || true
python3 - "$target" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from packaging.requirements import Requirement
import torch
if torch.__version__.split("+")[0] != "@TORCH@":
    sys.exit("this bundle is for torch @TORCH@, found " + torch.__version__)
for dist in distributions(path=[sys.argv[1]]):
    for line in dist.requires or []:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(need.name)
        except PackageNotFoundError:
            have = None
        if have is None or not need.specifier.contains(have, prereleases=True):
            if need.name.lower().replace("_", "-") not in "@NOT_CARRIED@".split():
                print(f"note: {dist.name} wants {need}, found {have}")
import vllm
print("vLLM", vllm.__version__, "at", vllm.__path__[0], "with torch", torch.__version__)
PY
