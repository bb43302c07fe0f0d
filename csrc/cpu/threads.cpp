#include "threads.h"

#include <pthread.h>

#include <atomic>
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
  std::atomic<int64_t> next{0};

  void run(int32_t slot) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      body(context, unit, slot);
    }
  }
};

class Pool {
 public:
  // False where another call is in the pool.
  bool run(Job& job, int32_t threads) {
    std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = threads - 1;
      joined_ = 0;
    }
    work_.notify_all();
    job.run(0);
    // No unit is left to start. Whoever has not joined by now need not.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return running_ == 0; });
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
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return job_ && joined_ < wanted_; });
      Job& job = *job_;
      const int32_t slot = ++joined_;
      ++running_;
      lock.unlock();
      job.run(slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_;  // held by the call that uses the pool
  std::mutex mutex_;   // guards all below
  std::condition_variable work_, done_;
  Job* job_ = nullptr;
  int32_t wanted_ = 0, joined_ = 0, running_ = 0;
  int32_t workers_ = 0;  // guarded by caller_
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

}  // namespace

void parallel_for(int32_t threads, int64_t units, void (*body)(void*, int64_t, int32_t),
                  void* context) {
  if (threads > units) threads = int32_t(units);
  Job job{body, context, units};
  if (threads <= 1 || !shared_pool().run(job, threads)) job.run(0);
}

}  // namespace hivtp
