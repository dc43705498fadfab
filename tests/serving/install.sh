#!/usr/bin/env bash
# Installs what tests of serving need into `.triton/`: Triton Inference Server out of a Python
# package, its client, and what `launch/ask.py` reads names with.
#
# usage: tests/serving/install.sh
#
# Exit codes: 0 all is there; 1 something failed; 2 this machine's Python has no part in the
# package.
set -euo pipefail
cd "$(dirname "$0")/../.."

STAMP="nvidia-pytriton 0.7.0, tritonclient 2.73.0, pyarrow 20.0.0"
[ "$(cat .triton/VERSION 2>/dev/null)" != "$STAMP" ] || exit 0

python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $python in
    3.9 | 3.10 | 3.11 | 3.12) ;;
    *) echo "serving tests: the package has nothing for Python $python" >&2; exit 2 ;;
esac
echo "serving tests: to fetch $STAMP: 120 MB to download, 480 MB on disk in \`.triton\`" >&2
rm -rf .triton
python3 -m venv .triton || { echo "serving tests: python3 cannot make virtual environments" >&2; exit 2; }
pip=(.triton/bin/pip --quiet --disable-pip-version-check install)
"${pip[@]}" --no-deps nvidia-pytriton==0.7.0
"${pip[@]}" 'tritonclient[http,grpc]==2.73.0' 'numpy==1.26.4' 'pyarrow==20.0.0'
server=$(echo .triton/lib/python*/site-packages/pytriton/tritonserver)
ln -s "$(realpath "$server")" .triton/server
echo "$STAMP" >.triton/VERSION
