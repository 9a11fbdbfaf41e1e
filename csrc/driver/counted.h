// Instruction counts of single kernels, for callgrind: it collects inside `advkd_counted` alone (--toggle-collect) and writes a part
// of its file after every call (--dump-after), so that neither an oracle nor making its input counts. The lines printed here name
// the parts, in their order.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>

#include "cpu/dispatch.h"

extern "C" inline __attribute__((noinline)) void advkd_counted(const std::function<void()>& kernel) {
  kernel();
  // Without something to do after it the call would be a jump, and the function would end before the kernel began.
  asm volatile("");
}

namespace advkd {

struct Counter {
  bool active = false;
  std::string wanted;   // a part of the names to count
  std::string variant;  // dtype, layout, ...: what follows the op in a name

  // Run a kernel that makes `elements` elements, counted if its name is wanted.
  void run(const std::string& op, i64 elements, const std::function<void()>& kernel) const {
    const std::string name = op + ", " + variant;
    if (name.find(wanted) == std::string::npos) return kernel();
    advkd_counted(kernel);
    std::printf("%lld %s\n", elements, name.c_str());
  }
};

inline Counter counter;

// Whether the arguments are `count [NAME]`; then prints the instruction set whose kernels are counted.
inline bool starts_counting(int argc, char** argv) {
  if (argc < 2 || std::strcmp(argv[1], "count") != 0) return false;
  counter.active = true;
  counter.wanted = argc > 2 ? argv[2] : "";
  std::printf("%s\n", kIsaNames[static_cast<int>(current_isa())]);
  return true;
}

}  // namespace advkd
