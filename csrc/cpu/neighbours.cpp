#include "cpu/neighbours.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <string_view>

namespace advkd {
namespace {

// Load of others, per thread, up to which barriers are the quickest way to wait.
constexpr double kTolerated = 0.25;

}  // namespace

bool is_crowded(i64 threads, i64 processors, double load) {
  const i64 used = std::min(threads, processors);
  return static_cast<double>(used - processors) + load > kTolerated * static_cast<double>(used);
}

i64 fair_share(i64 threads, i64 processors, double load) {
  const auto all = static_cast<double>(processors), used = static_cast<double>(std::min(threads, processors));
  // The others may have had all processors while this process slept: it gets more as soon as it asks for it.
  const double share = std::max(all - load, all * used / (used + all));
  return std::clamp<i64>(std::lround(share), 1, std::min(threads, processors));
}

#if defined(__linux__)
namespace {

// Seconds between two readings of /proc/stat, which counts in hundredths.
constexpr double kInterval = 0.25;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double own_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

bool setting_is(const char* value) {
  const char* setting = std::getenv("ADVKD_SHARE");
  return setting && std::strcmp(setting, value) == 0;
}

// True unless this process is in a control group for processor time, or in a namespace in which any group looks like the root.
bool is_in_root_group() {
  constexpr std::string_view kInitialNamespace = "cgroup:[4026531835]";
  char name[64];
  const ssize_t length = readlink("/proc/self/ns/cgroup", name, sizeof name);
  if (length > 0 && std::string_view(name, length) != kInitialNamespace) return false;
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    // number:controllers:path, without controllers in version 2
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers = line.substr(first, second - first) + ',';
    controllers[0] = ',';
    const bool of_processors = controllers == ",," || controllers.find(",cpu,") != std::string::npos;
    if (of_processors && line.substr(second + 1) != "/") return false;
  }
  return true;
}

// True if `nice` orders all processes: it orders those of one group alone where processes are grouped by session or container.
bool nice_is_global() {
  std::string grouped;
  std::ifstream("/proc/sys/kernel/sched_autogroup_enabled") >> grouped;
  return grouped != "1" && is_in_root_group();
}

std::vector<int> affinity() {
  std::vector<int> processors;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return processors;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) processors.push_back(cpu);
  return processors;
}

class Watch {
 public:
  explicit Watch(bool forked) : forked_(forked) {}

  std::vector<int> of_thread(i64 threads) {
    // Threads may be bound to different processors, and are bound anew while others come and go.
    thread_local std::vector<int> allowed;
    thread_local double read = 0;
    if (const double time = now(); time - read >= kInterval) allowed = affinity(), read = time;
    const std::lock_guard lock(mutex_);
    read_if_due();
    if (!crowded(threads, allowed)) return {};
    return keep(threads, allowed, {sched_getcpu()});
  }

  std::vector<int> of_process(i64 threads, const std::vector<int>& allowed, const std::vector<int>& kept) {
    const std::lock_guard lock(mutex_);
    read_if_due();
    if (!crowded(threads, allowed)) return {};
    return keep(threads, allowed, may_leave(kept, allowed) ? std::vector<int>{} : kept);
  }

  bool read_if_due() {
    const double time = now(), seconds = time - time_;
    if (seconds < kInterval) return false;
    const double own = own_seconds();
    std::vector<double> busy = busy_seconds();
    // Not to be read for want of descriptors, say: nothing is known until the next time.
    if (busy.empty()) busy = before_;
    busy_.resize(busy.size());
    before_.resize(busy.size());
    // A processor that has just been switched on, or off, counts from its next reading on.
    for (size_t i = 0; i < busy.size(); ++i)
      if (before_[i] == 0 || busy[i] < before_[i]) before_[i] = busy[i];
    // The first reading is where the next one begins.
    const double kept = time_ == 0 ? 1 : std::exp2(-seconds / kInterval);
    for (size_t i = 0; i < busy.size(); ++i) busy_[i] = kept * busy_[i] + (1 - kept) * (busy[i] - before_[i]) / seconds;
    own_ = kept * own_ + (1 - kept) * (own - own_before_) / seconds;
    before_ = std::move(busy), own_before_ = own, time_ = time;
    return true;
  }

 private:
  // user, system, irq and softirq of every processor, and the time of processes that gave way by `nice` where those do not
  // give way to this one.
  static std::vector<double> busy_seconds() {
    const bool niced_counts = getpriority(PRIO_PROCESS, 0) > 0 || !nice_is_global();
    const double tick = 1.0 / static_cast<double>(sysconf(_SC_CLK_TCK));
    std::vector<double> busy;
    std::ifstream file("/proc/stat");
    for (std::string line; std::getline(file, line) && line.starts_with("cpu");) {
      std::istringstream words(line.substr(3));
      size_t cpu;
      double user, niced, system, idle, waiting, irq, softirq;
      if (line[3] == ' ' || !(words >> cpu >> user >> niced >> system >> idle >> waiting >> irq >> softirq)) continue;
      busy.resize(std::max(busy.size(), cpu + 1));
      busy[cpu] = tick * (user + system + irq + softirq + (niced_counts ? niced : 0));
    }
    return busy;
  }

  double busy(int cpu) const { return static_cast<size_t>(cpu) < busy_.size() ? busy_[cpu] : 0; }

  // Processors' worth of time that others take of these.
  double load(const std::vector<int>& processors) const {
    double sum = -own_;
    for (const int cpu : processors) sum += busy(cpu);
    return std::clamp(sum, 0.0, static_cast<double>(processors.size()));
  }

  bool crowded(i64 threads, const std::vector<int>& allowed) const {
    if (threads < 2 || allowed.empty()) return false;
    if (forked_ || setting_is("1")) return true;
    if (setting_is("0")) return false;
    return is_crowded(threads, static_cast<i64>(allowed.size()), load(allowed));
  }

  // First those of `kept`, then the idlest.
  std::vector<int> keep(i64 threads, const std::vector<int>& allowed, const std::vector<int>& kept) const {
    const i64 count = fair_share(threads, static_cast<i64>(allowed.size()), load(allowed));
    const auto is_kept = [&](int cpu) { return std::find(kept.begin(), kept.end(), cpu) != kept.end(); };
    std::vector<int> order = allowed;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return is_kept(a) != is_kept(b) ? is_kept(a) : busy(a) < busy(b);
    });
    order.resize(count);
    return order;
  }

  // True, by chance, where a neighbour is on ours and another processor lies idle: of two processes that keep to one processor
  // one leaves.
  bool may_leave(const std::vector<int>& kept, const std::vector<int>& allowed) {
    double idlest = 1;
    for (const int cpu : allowed)
      if (std::find(kept.begin(), kept.end(), cpu) == kept.end()) idlest = std::min(idlest, busy(cpu));
    return load(kept) > kTolerated && idlest < kTolerated && chance_() % 2 == 0;
  }

  const bool forked_;
  std::mutex mutex_;
  std::vector<double> busy_, before_;  // by processor: of a second, and seconds at the last reading
  double own_ = 0, own_before_ = 0, time_ = 0;
  std::minstd_rand chance_{static_cast<unsigned>(getpid())};
};

// Read when the library is loaded, so that the first call has a reading to begin from. Never destroyed: other threads may ask
// until the end. A forked child begins anew, whatever its parent's threads were doing, and counts as crowded: OpenMP, whose threads
// it has not, would wait for them.
Watch* watch = [] {
  pthread_atfork(nullptr, nullptr, [] { watch = new Watch(true); });
  auto* first = new Watch(false);
  first->read_if_due();
  return first;
}();

}  // namespace

std::vector<int> crowded_processors(i64 threads) {
  return watch->of_thread(threads);
}

std::vector<int> crowded_processors(i64 threads, const std::vector<int>& allowed, const std::vector<int>& kept) {
  return watch->of_process(threads, allowed, kept);
}

#else

std::vector<int> crowded_processors(i64) {
  return {};
}

std::vector<int> crowded_processors(i64, const std::vector<int>&, const std::vector<int>&) {
  return {};
}

#endif

}  // namespace advkd
