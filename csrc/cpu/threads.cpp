#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "job.h"

namespace hivtp {
namespace {

// Polls for about as long as a sleeping thread takes to wake: calls often follow each other. Yields
// to anything else with work on this core, which may be the caller.
template <class Condition>
void await_briefly(Condition condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  while (!condition() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
}

class Pool {
 public:
  // False if another call is using the pool.
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
    // No unit is left to start. Workers that have not joined by now need not.
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
      // The system has no more threads: calls share the existing ones.
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
  std::mutex mutex_;   // held to write any member below
  std::condition_variable work_, done_;
  Job* job_ = nullptr;
  std::atomic<int32_t> places_{0};   // workers that may still join
  std::atomic<int32_t> running_{0};  // workers that have
  int32_t workers_ = 0;              // guarded by caller_
};

// Never destroyed: workers may still wait in it while the process exits. A forked child has none of
// the workers, so it starts with a new pool.
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

void parallel_for(int32_t threads, int32_t useful, int64_t units,
                  void (*body)(void*, int64_t, int32_t), void* context) {
  if (useful > units) useful = int32_t(units);
  Job job{body, context, units, useful};
  if (useful <= 1) return job.call();
  if (!run_on_torch_team(job, threads) && !shared_pool().run(job)) job.call();
}

}  // namespace hivtp
