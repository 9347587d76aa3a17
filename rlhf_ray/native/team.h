// The threads of one pass: each takes its share of every loop, and they meet between loops.
//
// They spin before they yield.  A pass meets a hundred times, and OpenMP's own barrier costs 50 microseconds where idle
// threads are told to sleep soon, as they are where several workers share the cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include <omp.h>

namespace {

constexpr int SPINS = 1 << 13;

struct Barrier {
    std::atomic<int> arrived{0}, round{0};
};

struct Team {
    Barrier& barrier;
    const int rank = omp_get_thread_num(), size = omp_get_num_threads();

    explicit Team(Barrier& shared) : barrier(shared) {}

    // This thread's tasks among n are [first, last).
    int64_t first(int64_t n) const { return n * rank / size; }
    int64_t last(int64_t n) const { return n * (rank + 1) / size; }

    void wait() {
        if (size == 1) return;
        const int round = barrier.round.load(std::memory_order_acquire);
        if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            barrier.arrived.store(0, std::memory_order_relaxed);
            barrier.round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; barrier.round.load(std::memory_order_acquire) == round;)
            if (++spins > SPINS) std::this_thread::yield();
    }
};

}  // namespace
