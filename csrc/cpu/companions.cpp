#include "cpu/companions.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace advkd {
namespace {

thread_local bool in_task = false;  // tasks within a task are the thread's own

class Companions {
 public:
  void run(i64 tasks, i64 threads, const std::vector<int>& processors, const std::function<void(i64)>& body) {
    std::unique_lock<std::mutex> only;
    if (!in_task && tasks > 1 && threads > 1) only = std::unique_lock(caller_, std::try_to_lock);
    if (!only) {
      for (i64 task = 0; task < tasks; ++task) body(task);
      return;
    }
    gather(std::min(threads, tasks) - 1, processors);
    std::unique_lock lock(mutex_);
    body_ = &body, next_ = 0, tasks_ = tasks, error_ = nullptr;
    work_ready_.notify_all();
    take(lock);
    done_.wait(lock, [&] { return running_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Tasks until none is left; the lock is open while one runs.
  void take(std::unique_lock<std::mutex>& lock) {
    while (next_ < tasks_) {
      const i64 task = next_++;
      const auto& body = *body_;
      ++running_;
      lock.unlock();
      std::exception_ptr error;
      in_task = true;
      try {
        body(task);
      } catch (...) {
        error = std::current_exception();
      }
      in_task = false;
      lock.lock();
      if (error) error_ = error, next_ = tasks_;
      if (--running_ == 0) done_.notify_one();
    }
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_ready_.wait(lock, [&] { return next_ < tasks_; });
      take(lock);
    }
  }

  void gather(i64 count, const std::vector<int>& processors) {
    try {
      while (static_cast<i64>(threads_.size()) < count) {
        threads_.emplace_back([this] { serve(); });
        kept_.clear();
#if defined(__linux__)
        pthread_setname_np(threads_.back().native_handle(), "advkd companion");
#endif
      }
    } catch (const std::system_error&) {
      // At a limit on threads those that there are do the work.
    }
    keep_to(processors);
  }

#if defined(__linux__)
  void keep_to(const std::vector<int>& processors) {
    if (processors == kept_ || processors.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int cpu : processors) CPU_SET(cpu, &set);
    for (auto& thread : threads_) pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
    kept_ = processors;
  }
#else
  void keep_to(const std::vector<int>&) {}
#endif

  std::mutex caller_;  // held by the thread whose tasks they are
  std::vector<std::thread> threads_;
  std::vector<int> kept_;

  std::mutex mutex_;  // of all below
  std::condition_variable work_ready_, done_;
  const std::function<void(i64)>* body_ = nullptr;
  i64 next_ = 0, tasks_ = 0, running_ = 0;
  std::exception_ptr error_;
};

// Never destroyed: companions sleep until the process ends. A forked child has none of its parent's threads and begins anew.
Companions* companions = [] {
  pthread_atfork(nullptr, nullptr, [] { companions = new Companions; });
  return new Companions;
}();

}  // namespace

void run_with_companions(i64 tasks, i64 threads, const std::vector<int>& processors, const std::function<void(i64)>& body) {
  companions->run(tasks, threads, processors, body);
}

}  // namespace advkd
