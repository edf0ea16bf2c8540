#!/usr/bin/env bash
# Everything that a card can tell, in one call of under 10 minutes, from the root of a checkout:
#
#   bash benchmarks/gpu.sh [--device cuda|cpu] [--tiny] [--stages correctness,mfu,...] [--only 'TEXT|TEXT'] [--seconds 560]
#
# Stages, in order: correctness, mfu, peers, memory, kernel_times, fp8, further; and, only where it is asked for,
# variants, which tells what changes of lmssl would gain. A stage ends when what is left of
# --seconds is what those behind it keep for themselves, so that time that one does not use is the next one's, and the
# whole is bounded. Required rows come first; one for which no time is left is recorded as such. What a call left out
# a second one can do, e.g. `--stages fp8,further`, or `--stages mfu --only '1.3B|4096'` for some rows of mfu, fp8 and
# further. A stage that fails does not lose the others. Rows are written as JSON lines as soon as they are known, to
# $OUT where that is set and else to benchmarks/results. The machine needs no network: what its Python lacks is
# installed from the wheels of benchmarks/gpu_wheels.sh into a temporary folder, and its own packages stay as they are.
# `--device cpu --tiny` shows on any machine that the script works; its numbers mean nothing and go to build/gpu-tiny.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda tiny=() seconds=560 stages=correctness,mfu,peers,memory,kernel_times,fp8,further only=
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2 && shift 2 ;;
    --stages) stages=$2 && shift 2 ;;
    --seconds) seconds=$2 && shift 2 ;;
    --only) only=$2 && shift 2 ;;
    --tiny) tiny=(--tiny) && shift ;;
    *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d' >&2 && exit 2 ;;
  esac
done
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ ${#tiny[@]} -gt 0 ]; then
  out=${OUT:-build/gpu-tiny}
  seconds=100000
  export TORCHDYNAMO_DISABLE=1 # compiling alone takes minutes on a CPU
else
  out=${OUT:-benchmarks/results}
fi
mkdir -p "$out"
[ "$device" = cpu ] && export CUDA_VISIBLE_DEVICES="" ACCELERATE_USE_CPU=true

# Packages that are missing, beside and behind those that are there.
missing=$("$python" - <<'PYTHON'
from importlib.util import find_spec

names = ("pydantic", "ruamel.yaml", "zstandard", "orjson", "tenacity")
def there(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(*(name for name in names if not there(name)))
PYTHON
)
if [ -n "$missing" ]; then
  if ! compgen -G "benchmarks/gpu/wheels/*.whl" >/dev/null; then
    echo "gpu.sh: $missing missing; run benchmarks/gpu_wheels.sh where PyPI can be reached, and bring its folder" >&2
    exit 1
  fi
fi
install() { # FOLDER WHEEL...
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$@"
}
for wheel in benchmarks/gpu/wheels/*.whl; do
  case $wheel in
    */torchao-*) install "$scratch/further/torchao" "$wheel" || true ;; # where one row needs them, and nowhere else:
    */liger_kernel-*) install "$scratch/further/liger_kernel" "$wheel" || true ;; # transformers imports what it finds
    *.whl) [ -z "$missing" ] || install "$scratch/site" --upgrade "$wheel" || exit 1 ;;
  esac
done
export LMSSL_GPU_FURTHER="$scratch/further"
export PYTHONPATH="$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"
export LMSSL_GPU_RUN="$(date -u +%Y-%m-%dT%H:%M:%SZ)"
[ "$device" = cuda ] && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

[ "$stages" = memory ] || stages=prepare,$stages # which alone reads no text
status=0
# Seconds that a stage keeps free of those before it: what its required rows take, by guess. With prepare's they are
# less than --seconds; what installing took is counted, because $SECONDS is 0 where this script begins.
declare -A kept=([correctness]=75 [mfu]=140 [peers]=135 [memory]=40 [kernel_times]=35 [fp8]=50 [further]=0 [variants]=0)
order=(prepare correctness mfu peers memory kernel_times fp8 further variants)

chosen() { case ",$stages," in *",$1,"*) ;; *) return 1 ;; esac; }

stage() { # NAME [SCRIPT OPTION...]
  chosen "$1" || return 0
  local name=$1 script=${2:-$1} limit=$((seconds - SECONDS)) behind="" each
  shift $(($# > 2 ? 2 : $#))
  for each in "${order[@]}"; do
    [ -n "$behind" ] && chosen "$each" && limit=$((limit - kept[$each]))
    [ "$each" = "$name" ] && behind=yes
  done
  if [ "$limit" -lt 15 ]; then
    echo "== $name: no time was left" | tee -a "$out/gpu.log" && status=1 && return
  fi
  echo "== $name: at most $limit s" | tee -a "$out/gpu.log"
  local start=$SECONDS until=$(($(date +%s) + limit))
  # The stage ends itself at that time, and writes what it was at; these signals are for one that cannot.
  timeout --kill-after=5 $((limit + 3)) "$python" "benchmarks/gpu/$script.py" --device "$device" \
    ${tiny[@]+"${tiny[@]}"} --out "$out" --scratch "$scratch/work" --until "$until" "$@" 2>&1 | tee -a "$out/gpu.log"
  local code=${PIPESTATUS[0]}
  echo "== $name: $((SECONDS - start)) s, status $code" | tee -a "$out/gpu.log"
  [ "$code" -eq 0 ] || status=1
}
stage prepare
stage correctness
stage mfu mfu --set required --only "$only"
stage peers
stage memory
stage kernel_times
PYTHONPATH="$scratch/further/torchao:$PYTHONPATH" stage fp8 mfu --set fp8 --only "$only"
stage further mfu --set further --only "$only"
stage variants mfu --set variants --only "$only"
echo "== all: $SECONDS s; results in $out"
exit "$status"
