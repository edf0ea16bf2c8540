#!/usr/bin/env bash
# Download what a GPU machine without a network lacks, as wheels for Python 3.12 on Linux: run it where PyPI is reached.
#
#   bash benchmarks/gpu_wheels.sh [FOLDER]      default: benchmarks/gpu/wheels, which git ignores
#
# Such a machine is taken to have torch, transformers, accelerate, tokenizers, safetensors, huggingface_hub, numpy,
# pyarrow, psutil, filelock, fsspec, xxhash, typer, rich, pytest and pytest-timeout. Versions are those of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/gpu/wheels}
most_bytes=$((50 * 1024 * 1024))
python=${PYTHON:-python3}
needed=(pydantic pydantic-core annotated-types typing-inspection ruamel.yaml zstandard orjson tenacity gigatoken awkward awkward-cpp)
further=(torchao liger-kernel) # for rows that are left out without them

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
for name in "${needed[@]}"; do
  pattern="^$(printf '%s' "$name" | sed 's/[-_.]/[-_.]/g')=="
  grep -iE "$pattern" constraints.txt >>"$pins" || echo "$name" >>"$pins"
done
rm -rf "$folder"
mkdir -p "$folder"
fetch() {
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$folder" "$@"
}
fetch -r "$pins"
for name in "${further[@]}"; do
  fetch "$name" || echo "gpu_wheels.sh: $name could not be had; its rows will be left out" >&2
done
size=$(du -sb "$folder" | cut -f1)
ls -l "$folder"
echo "$size bytes"
if [ "$size" -gt "$most_bytes" ]; then
  echo "gpu_wheels.sh: more than $most_bytes bytes; take something out of $folder" >&2
  exit 1
fi
