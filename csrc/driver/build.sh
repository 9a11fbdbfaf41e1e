#!/usr/bin/env bash
# Builds a Torch-free driver of CPU kernels: csrc/driver/build.sh conv|step|critic|norm|threads OUTPUT [FLAGS...]
#
#   csrc/driver/build.sh conv driver
#   csrc/driver/build.sh step driver -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
#   CXX=aarch64-linux-gnu-g++ csrc/driver/build.sh conv driver -static && qemu-aarch64 ./driver
#   ISAS="baseline avx2" csrc/driver/build.sh conv driver && ADVKD_ISA=avx2 ./driver      no other instruction set is compiled
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
name=$1 output=$2
shift 2
declare -A kernels=(
    [conv]="conv_block student_forward" [step]="sampler_step philox"
    [critic]="conv_bias_act_mask mask_mul penalty_reduce interpolate image_gradient" [norm]="norm_act" [threads]="companions neighbours"
)
compiler=${CXX:-g++}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export root compiler folder

# The flags are the extension's own: those of all units first, then each unit's.
flags=$(cd "$root" && "${PYTHON:-python3}" - "$("$compiler" -dumpmachine | cut -d- -f1)" ${kernels[$name]} <<'PYTHON'
import os, runpy, sys
import setuptools
setuptools.setup = lambda **options: None
names = runpy.run_path("setup.py")
print(*names["host_flags"](include=False))
sources, isas = [f"csrc/cpu/{kernel}.cpp" for kernel in sys.argv[2:]], os.environ.get("ISAS", "").split()
for source, suffix, flags in names["cpu_units"](sources, sys.argv[1]):
    if not isas or not flags or (suffix[1:] or "baseline") in isas:
        print(source, suffix or "-", *flags)
PYTHON
)
read -r -a shared <<< "$flags"
# Kernels of an instruction set that was left out are never called.
link=(${ISAS:+-Wl,--unresolved-symbols=ignore-all})
unit() {
    local source=$1 suffix=$2
    shift 2
    "$compiler" "${shared[@]}" -std=c++20 -Wextra -pthread -I"$root/csrc" "$@" -c "$root/$source" -o "$folder/$(basename "$source")$suffix.o"
}
pids=()
while read -r source suffix flags; do
    # shellcheck disable=SC2086
    unit "$source" "$suffix" $flags "$@" &
    pids+=($!)
done <<< "${flags#*$'\n'}"
unit "csrc/driver/${name}_driver.cpp" - "$@" &
pids+=($!)
for pid in "${pids[@]}"; do wait "$pid"; done
# Baseline code first: of an inline function that several objects hold the linker keeps the first copy.
shopt -s nullglob
"$compiler" -pthread "$@" "$folder"/*.cpp-.o "$folder"/*.cpp.*.o "${link[@]}" -o "$output"
