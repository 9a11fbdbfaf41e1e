#!/usr/bin/env bash
# Builds a Torch-free driver of CPU kernels: csrc/driver/build.sh conv|step|critic|norm OUTPUT [FLAGS...]
#
#   csrc/driver/build.sh conv driver
#   csrc/driver/build.sh step driver -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
#   CXX=aarch64-linux-gnu-g++ csrc/driver/build.sh conv driver -static && qemu-aarch64 ./driver
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
name=$1 output=$2
shift 2
declare -A kernels=(
    [conv]="conv_block student_forward" [step]="sampler_step"
    [critic]="conv_bias_act_mask mask_mul penalty_reduce interpolate" [norm]="norm_act"
)
compiler=${CXX:-g++}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export root compiler folder

# The flags of each unit are the extension's own.
units=$(cd "$root" && "${PYTHON:-python3}" - "$("$compiler" -dumpmachine | cut -d- -f1)" ${kernels[$name]} <<'PYTHON'
import runpy, sys
import setuptools
setuptools.setup = lambda **options: None
names = runpy.run_path("setup.py")
sources = [f"csrc/cpu/{kernel}.cpp" for kernel in sys.argv[2:]]
for source, suffix, flags in names["cpu_units"](sources, sys.argv[1]):
    print(source, suffix or "-", *flags)
PYTHON
)
unit() {
    local source=$1 suffix=$2
    shift 2
    "$compiler" -std=c++20 -O2 -ffp-contract=off -Wall -Wextra -pthread -I"$root/csrc" "$@" -c "$root/$source" -o "$folder/$(basename "$source")$suffix.o"
}
pids=()
while read -r source suffix flags; do
    # shellcheck disable=SC2086
    unit "$source" "$suffix" $flags "$@" &
    pids+=($!)
done <<< "$units"
unit "csrc/driver/${name}_driver.cpp" - "$@" &
pids+=($!)
for pid in "${pids[@]}"; do wait "$pid"; done
# Baseline code first: of an inline function that several objects hold the linker keeps the first copy.
shopt -s nullglob
"$compiler" -pthread "$@" "$folder"/*.cpp-.o "$folder"/*.cpp.*.o -o "$output"
