#!/usr/bin/env bash
# Builds the Torch-free driver of the CPU kernels: csrc/driver/build.sh OUTPUT [FLAGS...]
#
#   csrc/driver/build.sh driver
#   csrc/driver/build.sh driver -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
#   CXX=aarch64-linux-gnu-g++ csrc/driver/build.sh driver -static && qemu-aarch64 ./driver
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
output=$1
shift
compiler=${CXX:-g++}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export root compiler folder

# The flags of each unit are the extension's own.
units=$(cd "$root" && "${PYTHON:-python3}" - "$("$compiler" -dumpmachine | cut -d- -f1)" <<'PYTHON'
import runpy, sys
import setuptools
setuptools.setup = lambda **options: None
names = runpy.run_path("setup.py")
for source, suffix, flags in names["cpu_units"](["csrc/cpu/conv_block.cpp", "csrc/cpu/student_forward.cpp"], sys.argv[1]):
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
unit csrc/driver/conv_driver.cpp - "$@" &
pids+=($!)
for pid in "${pids[@]}"; do wait "$pid"; done
# Baseline code first: of an inline function that several objects hold the linker keeps the first copy.
objects=("$folder/conv_driver.cpp-.o" "$folder/conv_block.cpp-.o" "$folder/student_forward.cpp-.o")
shopt -s nullglob
"$compiler" -pthread "$@" "${objects[@]}" "$folder"/*.cpp.*.o -o "$output"
