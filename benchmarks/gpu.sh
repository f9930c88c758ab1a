#!/usr/bin/env bash
# Everything that is claimed of one GPU, measured by one command:
#
#   benchmarks/gpu.sh OUT [--toy] [tests] [step] [small] [loader] [peers] [learning]
#
# without names all parts, the most telling first. It needs Python with torch, torchvision, timm, lightning and the rest
# of pyproject.toml, no network; wheels in .whl/ are installed into a folder of their own. Each part has its own
# time limit and a failure of one does not end the others; rows of claims.csv are written as they are measured. At the end
# stands the table of claims met and missed. Where there is no CUDA (or with --toy) all sizes are tiny.
#
# PYTHON   the interpreter (python3)
# CIFAR    images for `small` (.npy, .parquet, folder); without it smooth random ones
# PHOTOS   a folder of photographs for `loader`; without it some are made
# SECONDS_IN_ALL  time for all parts together (475); `learning` gets what is left
set -u
usage="usage: benchmarks/gpu.sh OUT [--toy] [PARTS...]"
out=${1:?$usage}; shift
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"; out=$(cd "$out" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/freqmask-gpu.XXXXXX")
python=${PYTHON:-python3}
all=${SECONDS_IN_ALL:-475}
toy=""; parts=()
for word in "$@"; do
    case $word in
        --toy) toy=--toy ;;
        tests|step|small|loader|peers|learning) parts+=("$word") ;;
        *) echo "$usage: $word is no part" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests step small loader peers learning)
cd "$root" || exit 1

path=$root/src
if ls .whl/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" .whl/*.whl >>"$out/log.txt" 2>&1 &&
        path=$path:$work/site
fi
export PYTHONPATH=$path PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} \
    XDG_CACHE_HOME=$work/cache TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton \
    FREQMASK_BENCHMARK_WORK=$work

declare -A limits=([tests]=110 [step]=140 [small]=110 [loader]=80 [peers]=60 [learning]=$all)
{ date; nvidia-smi; "$python" -m pip list 2>/dev/null; } >"$out/environment.txt" 2>&1
if [ -z "$toy" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    toy=--toy; echo "no CUDA device: toy sizes on the CPU" | tee -a "$out/log.txt"
fi

for part in "${parts[@]}"; do
    left=$((all - SECONDS - 5)); limit=${limits[$part]}
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then echo "== $part: no time left" | tee -a "$out/log.txt"; continue; fi
    began=$SECONDS
    echo "== $part (at most $limit s, at $SECONDS s)" | tee -a "$out/log.txt"
    timeout -k 5 "$limit" "$python" benchmarks/gpu.py "$part" --out "$out" --seconds "$limit" $toy 2>&1 |
        tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || echo "== $part ended with $code after $((SECONDS - began)) s" | tee -a "$out/log.txt"
done
"$python" benchmarks/record.py "$out" | tee "$out/table.txt"
rm -rf "$work"
