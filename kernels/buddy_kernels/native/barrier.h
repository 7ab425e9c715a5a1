#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>

namespace buddy {

// Spins, since the others are microseconds away; sleeps when one of them has lost its core.
struct Barrier {
    explicit Barrier(int64_t count) : count(static_cast<int>(count)) {}
    void wait(int most_spins = 2000) {
        const int64_t phase = passed.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            passed.store(phase + 1, std::memory_order_release);
            passed.notify_all();
            return;
        }
        for (int spins = 0; spins < most_spins; ++spins) {
            if (passed.load(std::memory_order_acquire) != phase) return;
            _mm_pause();
        }
        passed.wait(phase, std::memory_order_acquire);
    }
    const int count;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int64_t> passed{0};
};

}  // namespace buddy
