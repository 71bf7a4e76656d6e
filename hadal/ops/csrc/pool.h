// A pool of threads for loops of microseconds, kind to a busy machine.
//
// OpenMP's barrier waits for every thread, also for one that the system has put aside while other programs run: on a
// busy machine each loop then costs milliseconds. Here the caller hands out pieces from a counter, works on them
// itself, and waits only for pieces that another thread has begun. Idle workers spin for a short while (decoding
// calls dozens of loops in a row), then sleep. A caller that finds the pool in use runs its loop alone.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
inline void relax() { _mm_pause(); }
#else
inline void relax() { std::this_thread::yield(); }
#endif

#ifndef POOL_PAUSE
#define POOL_PAUSE()  // tests widen the moment in which a job is written and not yet handed out
#endif

class Pool {
 public:
  typedef void (*Piece)(void* job, int64_t index);

  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: workers may outlive static destruction
    return *pool;
  }

  // Threads that share the work, the caller included. Workers are started once and only ever added.
  void resize(int threads) {
    std::lock_guard<std::mutex> guard(use_);
    threads_ = threads < 1 ? 1 : threads;
    while (int(started_) < threads_ - 1) {
      std::thread(&Pool::serve, this, started_).detach();
      ++started_;
    }
  }
  int threads() const { return threads_; }

  // piece(job, 0 … count − 1), in any order, on several threads; returns when all are done.
  void run(int64_t count, Piece piece, void* job) {
    std::unique_lock<std::mutex> guard(use_, std::try_to_lock);
    if (!guard.owns_lock() || threads_ == 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) piece(job, i);
      return;
    }
    piece_.store(piece, std::memory_order_relaxed);
    job_.store(job, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    POOL_PAUSE();
    uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(epoch << 32 | uint64_t(count), std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    while (take()) {
    }
    while (done_.load(std::memory_order_acquire) != count) relax();
  }

 private:
  // Begin and finish one piece, if any is left. A ticket is (epoch, pieces left). While pieces of an epoch are left,
  // `run` has not returned and its job's fields stand; a ticket with none left says so by itself. So taking one
  // succeeds only with the fields of its own epoch, however long ago they were read.
  bool take() {
    uint64_t seen = ticket_.load(std::memory_order_acquire);
    for (;;) {
      int64_t left = int64_t(seen & 0xffffffffu), count = count_.load(std::memory_order_relaxed);
      Piece piece = piece_.load(std::memory_order_relaxed);
      void* job = job_.load(std::memory_order_relaxed);
      if (left == 0) return false;
      if (ticket_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) {
        piece(job, count - left);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  void serve(int number) {
    uint64_t last = 0;
    for (;;) {
      auto begin = std::chrono::steady_clock::now();
      for (int spin = 0; (ticket_.load(std::memory_order_acquire) >> 32) == last || number >= threads_ - 1; ++spin) {
        relax();
        if (spin % 256 == 255 && std::chrono::steady_clock::now() - begin > std::chrono::microseconds(SPIN_US)) {
          std::unique_lock<std::mutex> lock(sleep_);
          asleep_.fetch_add(1, std::memory_order_seq_cst);
          wake_.wait(lock, [&] { return (ticket_.load(std::memory_order_seq_cst) >> 32) != last && number < threads_ - 1; });
          asleep_.fetch_sub(1, std::memory_order_seq_cst);
          break;
        }
      }
      last = ticket_.load(std::memory_order_acquire) >> 32;
      while (take()) {
      }
    }
  }

  static constexpr int SPIN_US = 100;
  std::mutex use_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> count_{0}, done_{0};
  std::atomic<Piece> piece_{nullptr};
  std::atomic<void*> job_{nullptr};
  std::atomic<int> asleep_{0};
  std::atomic<int> threads_{1};
  int started_ = 0;
};

// body(begin, end) over [0, count) in pieces of `grain` at least, on the pool if `worth` it.
template <class Body>
void parallel(int64_t count, int64_t grain, bool worth, Body body) {
  Pool& pool = Pool::instance();
  if (!worth || pool.threads() == 1 || count <= grain) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  struct Job { Body* body; int64_t count, size; } job;
  int64_t pieces = std::min<int64_t>((count + grain - 1) / grain, pool.threads() * 4);
  job = {&body, count, (count + pieces - 1) / pieces};
  pieces = (count + job.size - 1) / job.size;
  pool.run(pieces, [](void* data, int64_t index) {
    Job* j = static_cast<Job*>(data);
    (*j->body)(index * j->size, std::min(j->count, (index + 1) * j->size));
  }, &job);
}
