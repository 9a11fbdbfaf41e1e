#include "cpu/neighbours.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <string>

namespace advkd {
namespace {

#if defined(__linux__)

// Seconds between two looks: the kernel counts in hundredths, and reading them takes a thousandth of that on large machines.
constexpr double kInterval = 0.25;
// Of one processor: what others must take more than what is left, so that the machine counts as crowded, and as free again.
constexpr double kCrowded = 0.5, kFree = 0.25;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double own_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

bool wish_is(const char* value) {
  const char* wish = std::getenv("ADVKD_SHARE");
  return wish && std::strcmp(wish, value) == 0;
}

class Watch {
 public:
  explicit Watch(std::vector<int> allowed) : allowed_(std::move(allowed)), always_(wish_is("1")), before_(read()) {
    if (always_) kept_ = allowed_;
  }

  // A forked child's, whatever the parent's threads were doing.
  Watch* again() const { return new Watch(allowed_); }

  std::vector<int> processors(i64 threads) {
    if (allowed_.empty() || threads < 2) return {};
    const std::lock_guard lock(mutex_);
    if (now() - before_.time >= kInterval) look(threads);
    return kept_;
  }

 private:
  struct Look {
    double time = 0, own = 0;
    std::vector<double> busy;  // seconds of each processor of `allowed_`
  };

  // user, system, irq and softirq of every allowed processor. Time of processes that gave way by `nice` counts only for one
  // that did so itself.
  Look read() const {
    Look look{now(), own_seconds(), std::vector<double>(allowed_.size())};
    const bool nice = getpriority(PRIO_PROCESS, 0) > 0;
    const double tick = 1.0 / static_cast<double>(sysconf(_SC_CLK_TCK));
    std::ifstream file("/proc/stat");
    for (std::string line; std::getline(file, line) && line.starts_with("cpu");) {
      std::istringstream words(line.substr(3));
      int cpu;
      double user, niced, system, idle, waiting, irq, softirq;
      if (line[3] == ' ' || !(words >> cpu >> user >> niced >> system >> idle >> waiting >> irq >> softirq)) continue;
      const auto found = std::lower_bound(allowed_.begin(), allowed_.end(), cpu);
      if (found == allowed_.end() || *found != cpu) continue;
      look.busy[found - allowed_.begin()] = tick * (user + system + irq + softirq + (nice ? niced : 0));
    }
    return look;
  }

  void look(i64 threads) {
    const Look after = read();
    const double seconds = after.time - before_.time, own = (after.own - before_.own) / seconds;
    std::vector<double> busy(allowed_.size());
    for (size_t i = 0; i < busy.size(); ++i) busy[i] = (after.busy[i] - before_.busy[i]) / seconds;
    before_ = after;
    const double processors = static_cast<double>(busy.size());
    const double load = std::clamp(std::accumulate(busy.begin(), busy.end(), 0.0) - own, 0.0, processors);
    const double excess = static_cast<double>(threads) + load - processors;
    if (!always_ && excess <= (kept_.empty() ? kCrowded : kFree))
      kept_.clear();
    else
      keep(std::clamp<i64>(static_cast<i64>(processors - load), 1, threads), busy, own);
  }

  // Those that were kept before, then the idlest. Where a neighbour is on ours and others lie idle, ours are given up, by chance:
  // two processes that do the same part that way.
  void keep(i64 count, const std::vector<double>& busy, double own) {
    const auto index = [&](int cpu) { return std::lower_bound(allowed_.begin(), allowed_.end(), cpu) - allowed_.begin(); };
    double shared = -own, idlest = 1;
    for (const int cpu : kept_) shared += busy[index(cpu)];
    std::vector<int> order = allowed_;
    const auto is_kept = [&](int cpu) { return std::find(kept_.begin(), kept_.end(), cpu) != kept_.end(); };
    for (const int cpu : order)
      if (!is_kept(cpu)) idlest = std::min(idlest, busy[index(cpu)]);
    if (shared > kFree && idlest < kFree && chance_() % 2 == 0) kept_.clear();
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return is_kept(a) != is_kept(b) ? is_kept(a) : busy[index(a)] < busy[index(b)];
    });
    kept_.assign(order.begin(), order.begin() + count);
  }

  const std::vector<int> allowed_;
  const bool always_;
  std::vector<int> kept_;
  std::mutex mutex_;
  Look before_;
  std::minstd_rand chance_{static_cast<unsigned>(getpid())};
};

std::vector<int> allowed_processors() {
  std::vector<int> allowed;
  cpu_set_t set;
  if (wish_is("0") || sched_getaffinity(0, sizeof set, &set) != 0) return allowed;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) allowed.push_back(cpu);
  return allowed;
}

// From the library's loading on, so that the first call knows; never destroyed, as other threads may look until the end.
Watch* watch = [] {
  pthread_atfork(nullptr, nullptr, [] { watch = watch->again(); });
  return new Watch(allowed_processors());
}();

#endif

}  // namespace

#if defined(__linux__)
std::vector<int> crowded_processors(i64 threads) {
  return watch->processors(threads);
}
#else
std::vector<int> crowded_processors(i64) {
  return {};
}
#endif

}  // namespace advkd
