#!/usr/bin/env bash
# Everything that a card can tell, in one call of under 10 minutes, from the root of a checkout:
#
#   bash benchmarks/gpu.sh [--device cuda|cpu] [--tiny] [--stages correctness,mfu,...] [--seconds 560]
#
# Stages: prepare, correctness, mfu, peers, memory, kernel_times, fp8, each with a time limit of its own; one that fails
# or runs out of time does not lose the others. Rows are written as JSON lines as soon as they are known, to $OUT where that is set
# and else to benchmarks/results. The machine needs no network: what its Python lacks is installed from the wheels of
# benchmarks/gpu_wheels.sh into a temporary folder, and its own packages stay as they are.
# `--device cpu --tiny` shows on any machine that the script works; its numbers mean nothing and go to build/gpu-tiny.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda tiny=() seconds=560 stages=prepare,correctness,mfu,peers,memory,kernel_times,fp8
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2 && shift 2 ;;
    --stages) stages=$2 && shift 2 ;;
    --seconds) seconds=$2 && shift 2 ;;
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

began=$SECONDS status=0
stage() { # NAME SECONDS [SCRIPT OPTION...]: seconds of it at most, or what is left of the whole
  case ",$stages," in *",$1,"*) ;; *) return ;; esac
  local left=$((seconds - (SECONDS - began))) name=$1 limit=$2 script=${3:-$1}
  shift $(($# > 3 ? 3 : $#))
  [ ${#tiny[@]} -gt 0 ] && limit=3600
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 20 ]; then
    echo "== $name: no time is left" && status=1 && return
  fi
  echo "== $name: at most $limit s"
  local start=$SECONDS
  timeout --kill-after=10 "$limit" "$python" "benchmarks/gpu/$script.py" --device "$device" ${tiny[@]+"${tiny[@]}"} \
    --out "$out" --scratch "$scratch/work" --seconds $((limit - 12)) "$@" 2>&1 | tee -a "$out/gpu.log"
  local code=${PIPESTATUS[0]}
  echo "== $name: $((SECONDS - start)) s, status $code" | tee -a "$out/gpu.log"
  [ "$code" -eq 0 ] || status=1
}
# Together the default of --seconds, so that no stage can take the last one's time.
stage prepare 60
stage correctness 110
stage mfu 150
stage peers 110
stage memory 40
stage kernel_times 50
PYTHONPATH="$scratch/further/torchao:$PYTHONPATH" stage fp8 40 mfu --only fp8
echo "== all: $((SECONDS - began)) s; results in $out"
exit "$status"
