// Runs companions from several callers at once and in a forked child: every task once; no Torch. For sanitizers:
//
//   threads_driver   exits with 1 if a case fails

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <new>
#include <thread>
#include <vector>

#include "cpu/companions.h"
#include "cpu/neighbours.h"

namespace {

using namespace advkd;

std::atomic<int> cases{0}, failures{0};

void expect(bool good, const char* what, i64 tasks, i64 threads) {
  ++cases;
  if (!good && failures++ < 10) std::printf("%s: %lld tasks, %lld threads\n", what, (long long)tasks, (long long)threads);
}

void every_task_once(i64 tasks, i64 threads, const std::vector<int>& processors) {
  std::vector<int> runs(tasks);
  run_with_companions(tasks, threads, processors, [&](i64 task) { ++runs[task]; });
  bool once = true;
  for (const int n : runs) once &= n == 1;
  expect(once, "a task did not run once", tasks, threads);
}

void all_sizes() {
  for (const i64 threads : {1, 2, 3, 5})
    for (const i64 tasks : {0, 1, 2, 7, 300})
      for (const auto& processors : {std::vector<int>{}, {0}, {0, 1}}) every_task_once(tasks, threads, processors);
}

// On whichever thread a task throws, the caller has the exception, and the next tasks run.
void exceptions() {
  for (const i64 bad : {0, 1, 99}) {
    const std::vector<int> many(1000, 0);
    bool caught = false;
    try {
      run_with_companions(100, 3, {0}, [many, bad](i64 task) {
        if (task == bad) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    expect(caught, "an exception did not arrive", 100, 3);
    every_task_once(100, 3, {0});
  }
}

void tasks_within_tasks() {
  std::vector<int> runs(60);
  run_with_companions(6, 3, {0}, [&](i64 outer) { run_with_companions(10, 3, {0}, [&](i64 i) { ++runs[10 * outer + i]; }); });
  bool once = true;
  for (const int n : runs) once &= n == 1;
  expect(once, "a task within a task did not run once", 60, 3);
}

void several_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(all_sizes);
  for (auto& caller : callers) caller.join();
}

void forked_child() {
  const pid_t child = fork();
  if (child == 0) {
    const int before = failures;
    all_sizes();
    crowded_processors(2);
    _exit(failures == before ? 0 : 1);
  }
  int status;
  waitpid(child, &status, 0);
  expect(status == 0, "a forked child", 0, 0);
}

struct Crowd {
  i64 threads, processors;
  double load;
  bool crowded;
  i64 share;
};

// Few threads on a large machine are crowded, too, and are not driven onto one processor where the others have had all.
void shares() {
  for (const Crowd& c : {Crowd{2, 2, 0.4, false, 2}, {2, 2, 0.6, true, 1}, {2, 2, 2.0, true, 1}, {8, 64, 0.0, false, 8},
                         {8, 64, 57.0, false, 7}, {8, 64, 64.0, true, 7}, {64, 64, 10.0, false, 54}, {64, 64, 64.0, true, 32},
                         {16, 8, 8.0, true, 4}, {2, 64, 64.0, true, 2}}) {
    expect(is_crowded(c.threads, c.processors, c.load) == c.crowded, "crowded", c.processors, c.threads);
    expect(fair_share(c.threads, c.processors, c.load) == c.share, "the share", c.processors, c.threads);
  }
}

}  // namespace

int main() {
  shares();
  all_sizes();
  exceptions();
  tasks_within_tasks();
  several_callers();
  forked_child();
  expect(crowded_processors(1).empty(), "one thread is never crowded", 0, 1);
  std::printf("%d cases, %d failures\n", cases.load(), failures.load());
  return failures ? 1 : 0;
}
