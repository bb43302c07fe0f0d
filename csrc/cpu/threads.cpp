#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace hivtp {
namespace {

struct Job {
  void (*body)(void*, int64_t, int32_t);
  void* context;
  int64_t units;
  int32_t useful;
  std::atomic<int64_t> claimed{0};
  std::atomic<int64_t> from_back{0};

  // The caller goes forward and its helpers backward, so that a core meets in its cache what it had
  // in the call before.
  void call() {
    for (int64_t unit = 0; claimed.fetch_add(1, std::memory_order_relaxed) < units; ++unit) {
      body(context, unit, 0);
    }
  }
  void help(int32_t slot) {
    while (claimed.fetch_add(1, std::memory_order_relaxed) < units) {
      body(context, units - 1 - from_back.fetch_add(1, std::memory_order_relaxed), slot);
    }
  }
};

// Looks for as long as a sleeper takes to wake: a call often follows another. Whatever else has
// work to do on this core goes first, and that may be the caller.
template <class Condition>
void await_briefly(Condition condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  while (!condition() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
}

class Pool {
 public:
  // False where another call is in the pool.
  bool run(Job& job) {
    std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    grow(job.useful - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      places_ = job.useful - 1;
    }
    work_.notify_all();
    job.call();
    // No unit is left to start. Whoever has not joined by now need not.
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;
    lock.unlock();
    const auto idle = [this] { return running_ == 0; };
    await_briefly(idle);
    lock.lock();
    done_.wait(lock, idle);
    return true;
  }

 private:
  void grow(int32_t workers) {
    try {
      for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system has no more threads to give: the calls share those there are.
    }
  }

  [[noreturn]] void serve() {
    const auto wanted = [this] { return places_ > 0; };
    for (;;) {
      await_briefly(wanted);
      std::unique_lock<std::mutex> lock(mutex_);
      work_.wait(lock, wanted);
      Job& job = *job_;
      const int32_t slot = places_--;
      ++running_;
      lock.unlock();
      job.help(slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_;  // held by the call that uses the pool
  std::mutex mutex_;   // held to write any below
  std::condition_variable work_, done_;
  Job* job_ = nullptr;
  std::atomic<int32_t> places_{0};   // workers that may still join
  std::atomic<int32_t> running_{0};  // workers that have
  int32_t workers_ = 0;              // guarded by caller_
};

// Never destroyed: workers may still wait in it while the process exits. A forked child has none
// of the workers, so it starts over with a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& shared_pool() {
  static const bool made = [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return true;
  }();
  (void)made;
  return *pool;
}

// The OpenMP runtime that torch computes with, where the process has one: its threads may still be
// looking for work when a call comes, and would keep the cores from ours. They do not survive a
// fork. The team is always the whole one, as torch's is: libgomp ends the threads that a smaller
// team leaves out, and torch's next op would have to start them again.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using ThreadNumber = int (*)();

template <class Function>
Function loaded(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

const ThreadNumber thread_number = loaded<ThreadNumber>("omp_get_thread_num");
std::atomic<ParallelRegion> torch_team{[] {
  pthread_atfork(nullptr, nullptr, [] { torch_team = nullptr; });
  return thread_number ? loaded<ParallelRegion>("GOMP_parallel") : nullptr;
}()};

void join(void* context) {
  Job& job = *static_cast<Job*>(context);
  const int32_t slot = thread_number();
  if (slot == 0) {
    job.call();
  } else if (slot < job.useful) {
    job.help(slot);
  }
}

}  // namespace

void parallel_for(int32_t threads, int32_t useful, int64_t units,
                  void (*body)(void*, int64_t, int32_t), void* context) {
  if (useful > units) useful = int32_t(units);
  Job job{body, context, units, useful};
  if (useful <= 1) return job.call();
  if (const ParallelRegion run = torch_team) {
    run(join, &job, unsigned(threads), 0);
  } else if (!shared_pool().run(job)) {
    job.call();
  }
}

}  // namespace hivtp
