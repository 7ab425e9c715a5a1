// Sums of products of weights and inputs: the ways that this processor has.
//
// A panel is 16 outputs, their weights for one input side by side; bf16 has pairs of inputs, int8 fours. PITCH panels may
// lie side by side. Every sum takes its inputs in order, whatever panels and rows are summed together: a row's result is
// its own. Two ways may differ in the last bits.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "inputs.h"
#include "interface.h"
#include "vector.h"

namespace buddy {

// 64 bytes of weights; those AHEAD bytes behind them are on their way.
template <int AHEAD, class Weight>
const Weight* fetched_ahead(const Weight* at) {
    if constexpr (AHEAD) _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
    return at;
}

// Each adds P panels times R rows, `count` inputs of them, to `sums`. Inlined always: else the sums live in memory.
struct FmaFp32 {
    using Weight = float;
    using Input = float;
    static constexpr int64_t TOGETHER = 1;  // inputs side by side in a panel
    template <int PITCH, int AHEAD, int P, int R>
    [[gnu::always_inline]] static void sum(
        const Weight* const (&panels)[P], const Input* const (&rows)[R], int64_t count, Vec (&sums)[P][R]
    ) {
        for (int64_t i = 0; i < count; ++i) {
            Vec weight[P];
            for (int p = 0; p < P; ++p) weight[p] = load(fetched_ahead<AHEAD>(panels[p] + i * LANES * PITCH));
            for (int r = 0; r < R; ++r) {
                const Vec value = splat(rows[r][i]);
                for (int p = 0; p < P; ++p) sums[p][r] += weight[p] * value;
            }
        }
    }
};

// Weights are widened to fp32.
struct FmaBf16 {
    using Weight = uint16_t;
    using Input = float;
    static constexpr int64_t TOGETHER = 2;
    template <int PITCH, int AHEAD, int P, int R>
    [[gnu::always_inline]] static void sum(
        const Weight* const (&panels)[P], const Input* const (&rows)[R], int64_t count, Vec (&sums)[P][R]
    ) {
        for (int64_t i = 0; i < count; i += 2) {
            Vec first[P], second[P];
            for (int p = 0; p < P; ++p) {
                const VecU both = *reinterpret_cast<const VecU*>(fetched_ahead<AHEAD>(panels[p] + i * LANES * PITCH));
                first[p] = (Vec)(both << 16), second[p] = (Vec)(both & 0xffff0000u);
            }
            for (int r = 0; r < R; ++r) {
                const Vec value = splat(rows[r][i]);
                for (int p = 0; p < P; ++p) sums[p][r] += first[p] * value;
            }
            for (int r = 0; r < R; ++r) {
                const Vec value = splat(rows[r][i + 1]);
                for (int p = 0; p < P; ++p) sums[p][r] += second[p] * value;
            }
        }
    }
};

#if defined(__AVX512BF16__)
// The processor's products of pairs, for which inputs are rounded too.
struct DotBf16 {
    using Weight = uint16_t;
    using Input = uint16_t;
    static constexpr int64_t TOGETHER = 2;
    template <int PITCH, int AHEAD, int P, int R>
    [[gnu::always_inline]] static void sum(
        const Weight* const (&panels)[P], const Input* const (&rows)[R], int64_t count, Vec (&sums)[P][R]
    ) {
        for (int64_t i = 0; i < count; i += 2) {
            __m512bh weight[P];
            for (int p = 0; p < P; ++p)
                weight[p] = (__m512bh)_mm512_loadu_si512(fetched_ahead<AHEAD>(panels[p] + i * LANES * PITCH));
            for (int r = 0; r < R; ++r) {
                int32_t both;
                std::memcpy(&both, rows[r] + i, 4);
                const auto value = (__m512bh)_mm512_set1_epi32(both);
                for (int p = 0; p < P; ++p) sums[p][r] = (Vec)_mm512_dpbf16_ps((__m512)sums[p][r], weight[p], value);
            }
        }
    }
};
#endif

// 16 sums of four products of unsigned weights and signed inputs.
#if defined(__AVX512VNNI__)
constexpr char DOT_INT8[] = "dpbusd";
#else
constexpr char DOT_INT8[] = "widened";
#endif
inline VecI dot_int8(VecI total, const uint8_t* weights, int32_t inputs) {
#if defined(__AVX512VNNI__)
    return (VecI)_mm512_dpbusd_epi32((__m512i)total, _mm512_loadu_si512(weights), _mm512_set1_epi32(inputs));
#else
    const VecU w = *reinterpret_cast<const VecU*>(weights);
    for (int i = 0; i < 4; ++i)
        total += (VecI)((w >> (8 * i)) & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(inputs >> (8 * i)));
    return total;
#endif
}

// Whole numbers within a group of 64, whose sums are scaled: `scales` of panels, by group; rows and groups of `x`.
struct DotInt8 {
    using Weight = uint8_t;
    static constexpr int64_t TOGETHER = 4;
    template <int PITCH, int AHEAD, int P, int R>
    [[gnu::always_inline]] static void sum(
        const Weight* const (&panels)[P], const float* const (&scales)[P], const Inputs& x, const int32_t* rows,
        Vec (&sums)[P][R]
    ) {
        const int64_t groups = x.width / PAD;
        for (int64_t group = 0; group < groups; ++group) {
            VecI total[P][R];
            const int8_t* in[R];
            for (int r = 0; r < R; ++r) {
                const int64_t of_row = rows[r] * groups + group;
                in[r] = &x.int8[of_row * PAD];
                // Weights are stored with 128 added.
                for (int p = 0; p < P; ++p) total[p][r] = VecI{} - 128 * x.sums[of_row];
            }
            for (int64_t i = 0; i < PAD; i += 4) {
                const Weight* w[P];
                for (int p = 0; p < P; ++p) w[p] = fetched_ahead<AHEAD>(panels[p] + (group * PAD + i) * LANES * PITCH);
                for (int r = 0; r < R; ++r) {
                    int32_t four;
                    std::memcpy(&four, in[r] + i, 4);
                    for (int p = 0; p < P; ++p) total[p][r] = dot_int8(total[p][r], w[p], four);
                }
            }
            for (int p = 0; p < P; ++p) {
                const Vec scale = load(scales[p] + group * LANES * PITCH);
                for (int r = 0; r < R; ++r)
                    sums[p][r] += __builtin_convertvector(total[p][r], Vec) * (scale * x.scales[rows[r] * groups + group]);
            }
        }
    }
};

}  // namespace buddy
