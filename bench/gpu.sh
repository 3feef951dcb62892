#!/bin/bash
# What only a GPU can show, in at most ten minutes, without a network: bench/gpu_parts.py says what the parts are.
#
#   bench/gpu.sh [--size 2b|tiny] [--out DIR] [--parts "a b c d e f"] [--wheels DIR] [--python PYTHON]
#
# Each part is a process with a time limit, and writes DIR/PART.json after every figure and DIR/PART.log: what a part
# has when its time is up is there. --wheels: packages that this host lacks (make gpu-wheels); nothing is installed, they
# are unpacked next to the models and put on the path.
set -u
size=2b out=build/gpu parts="a b c d e f" wheels="" python=python3
while [ $# -gt 0 ]; do
  [ $# -gt 1 ] || { echo "error: $1 has no value" >&2; exit 2; }
  case "$1" in
    --size) size=$2 ;;
    --out) out=$2 ;;
    --parts) parts=$2 ;;
    --wheels) wheels=$2 ;;
    --python) python=$2 ;;
    *) echo "error: $1 is not an option; --size, --out, --parts, --wheels and --python are" >&2; exit 2 ;;
  esac
  shift 2
done
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

# In memory where there is room for six models of 5.2 GB, else on the disk.
room=$(df --output=avail -B1G /dev/shm 2>/dev/null | tail -1 | tr -d ' ')
where=${TMPDIR:-/tmp}
if [ "$size" = tiny ] || [ "${room:-0}" -ge 40 ]; then [ -w /dev/shm ] && where=/dev/shm; fi
root=$(mktemp -d "$where/gemma2-gpu.XXXXXX") || exit 1
trap 'rm -rf "$root"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir "$root/path" "$root/models" && ln -s "$PWD" "$root/path/gemma2" || exit 1
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$root/path" "$wheels"/*.whl || exit 1
fi
[ "$size" = tiny ] && export OMP_NUM_THREADS=1
export PYTHONPATH="$root/path${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" -c 'import torch, trl, gemma2.cli.main' || { echo "error: the packages do not import; see make gpu-wheels" >&2; exit 1; }

limit() { case "$1" in models) echo 55 ;; a) echo 140 ;; b) echo 160 ;; c) echo 125 ;; d) echo 50 ;; e) echo 35 ;; *) echo 15 ;; esac; }
failed=0
for part in models $parts; do
  seconds=$(limit "$part")
  [ "$size" = tiny ] && seconds=600
  begin=$SECONDS
  timeout --kill-after=5 "$seconds" "$python" bench/gpu_parts.py "$part" --size "$size" --root "$root/models" --out "$out" \
    2> "$out/$part.log" || { failed=1; echo "$part  ended with exit code $? (124: its $seconds s were up); $out/$part.log"; tail -3 "$out/$part.log"; }
  echo "$part  $((SECONDS - begin)) s of $seconds"
  [ "$part" = models ] && [ $failed = 1 ] && exit 1
done
echo "$((SECONDS)) s; figures in $out"
exit $failed
