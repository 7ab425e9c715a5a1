// Packed weights times rows, and what becomes of the result.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "interface.h"
#include "vector.h"

namespace buddy {

constexpr int64_t CACHED_BYTES = 1 << 20;  // of inputs, beside the panels that go by
constexpr int64_t AHEAD_BYTES = 4096;      // of weights on their way from memory to a tile

// Rows as products read them: fp32, or int8 with a scale and a sum for every 64.
struct Inputs {
    bool is_int8 = false;
    int64_t width = 0;
    std::vector<float> fp32;
    std::vector<int8_t> int8;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    void shape(int64_t rows, int64_t new_width, int64_t weight_kind) {
        is_int8 = weight_kind == INT8, width = new_width;
        const auto grow = [](auto& buffer, int64_t size) {
            if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
        };
        if (is_int8)
            grow(int8, rows * width), grow(scales, rows * width / PAD), grow(sums, rows * width / PAD);
        else
            grow(fp32, rows * width);
    }

    void set(int64_t row, const float* x) {
        if (!is_int8) {
            std::copy_n(x, width, &fp32[row * width]);
        } else {
            for (int64_t i = 0; i < width; i += PAD) set_group((row * width + i) / PAD, x + i);
        }
    }

    void set_group(int64_t group, const float* x) {
        Vec most = Vec{};
        for (int64_t i = 0; i < PAD; i += LANES) most = max(most, max(load(x + i), -load(x + i)));
        const float scale = largest(most) / 127.f, inverse = scale > 0.f ? 1.f / scale : 0.f;
        VecI total = VecI{};
        for (int64_t i = 0; i < PAD; i += LANES) {
            const Vec shifted = load(x + i) * inverse + 12582912.f;
            const VecI whole = (VecI)shifted - 0x4b400000;
            total += whole;
            *reinterpret_cast<VecB*>(&int8[group * PAD + i]) = __builtin_convertvector((VecU)whole, VecB);
        }
        int32_t parts[LANES];
        *reinterpret_cast<VecI*>(parts) = total;
        sums[group] = 0;
        for (const int32_t part : parts) sums[group] += part;
        scales[group] = scale;
    }
};

// `row`, 64 bytes of weights; those that follow in its panel are on their way. The processor's own fetching ahead starts
// anew at every page of 4 KiB, and a panel has few.
template <int P, class Element>
const Element* fetched_ahead(const Element* row) {
    _mm_prefetch(reinterpret_cast<const char*>(row) + AHEAD_BYTES / P, _MM_HINT_T0);
    return row;
}

// P panels times R rows into `out`. Each output is one accumulator that takes its inputs in order, so P and R do not
// show in the result. Inlined always: else the sums live in memory.
template <int P, int R>
[[gnu::always_inline]] inline void tile_fp32(
    const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, Vec (&out)[P][R]
) {
    const float* w[P];
    const float* in[R];
    for (int p = 0; p < P; ++p) w[p] = reinterpret_cast<const float*>(m.panels) + (panel + p) * m.inputs * LANES;
    for (int r = 0; r < R; ++r) in[r] = &x.fp32[rows[r] * x.width];
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r) out[p][r] = Vec{};
    for (int64_t i = 0; i < m.inputs; ++i) {
        Vec weight[P];
        for (int p = 0; p < P; ++p) weight[p] = load(fetched_ahead<P>(w[p] + i * LANES));
        for (int r = 0; r < R; ++r) {
            const Vec value = splat(in[r][i]);
            for (int p = 0; p < P; ++p) out[p][r] += weight[p] * value;
        }
    }
}

// Widened to fp32: the processors' own bf16 products are half as fast where they exist, and round the inputs.
template <int P, int R>
[[gnu::always_inline]] inline void tile_bf16(
    const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, Vec (&out)[P][R]
) {
    const uint32_t* w[P];
    const float* in[R];
    const int64_t pairs = m.inputs / 2;
    for (int p = 0; p < P; ++p) w[p] = reinterpret_cast<const uint32_t*>(m.panels) + (panel + p) * pairs * LANES;
    for (int r = 0; r < R; ++r) in[r] = &x.fp32[rows[r] * x.width];
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r) out[p][r] = Vec{};
    for (int64_t i = 0; i < pairs; ++i) {
        Vec first[P], second[P];
        for (int p = 0; p < P; ++p) {
            const VecU both = *reinterpret_cast<const VecU*>(fetched_ahead<P>(w[p] + i * LANES));
            first[p] = (Vec)(both << 16), second[p] = (Vec)(both & 0xffff0000u);
        }
        for (int r = 0; r < R; ++r) {
            const Vec value = splat(in[r][2 * i]);
            for (int p = 0; p < P; ++p) out[p][r] += first[p] * value;
        }
        for (int r = 0; r < R; ++r) {
            const Vec value = splat(in[r][2 * i + 1]);
            for (int p = 0; p < P; ++p) out[p][r] += second[p] * value;
        }
    }
}

// 16 sums of four products of unsigned weights and signed inputs.
inline VecI dot_int8(VecI total, const uint32_t* weights, int32_t inputs) {
#if defined(__AVX512VNNI__)
    return (VecI)_mm512_dpbusd_epi32((__m512i)total, _mm512_loadu_si512(weights), _mm512_set1_epi32(inputs));
#else
    const VecU w = *reinterpret_cast<const VecU*>(weights);
    for (int i = 0; i < 4; ++i)
        total += (VecI)((w >> (8 * i)) & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(inputs >> (8 * i)));
    return total;
#endif
}

template <int P, int R>
[[gnu::always_inline]] inline void tile_int8(
    const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, Vec (&out)[P][R]
) {
    const int64_t groups = m.inputs / PAD, fours = m.inputs / 4;
    const auto* weights = reinterpret_cast<const uint32_t*>(m.panels) + panel * fours * LANES;
    const float* scales = m.scales + panel * groups * LANES;
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r) out[p][r] = Vec{};
    for (int64_t group = 0; group < groups; ++group) {
        VecI total[P][R];
        const int32_t* in[R];
        for (int r = 0; r < R; ++r) {
            const int64_t of_row = rows[r] * groups + group;
            in[r] = reinterpret_cast<const int32_t*>(&x.int8[of_row * PAD]);
            // Weights are stored with 128 added.
            for (int p = 0; p < P; ++p) total[p][r] = VecI{} - 128 * x.sums[of_row];
        }
        for (int64_t i = 0; i < PAD / 4; ++i) {
            const uint32_t* w[P];
            for (int p = 0; p < P; ++p) w[p] = fetched_ahead<P>(weights + (p * fours + group * PAD / 4 + i) * LANES);
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) total[p][r] = dot_int8(total[p][r], w[p], in[r][i]);
        }
        for (int p = 0; p < P; ++p) {
            const Vec scale = load(scales + (p * groups + group) * LANES);
            for (int r = 0; r < R; ++r)
                out[p][r] += __builtin_convertvector(total[p][r], Vec) * (scale * x.scales[rows[r] * groups + group]);
        }
    }
}

template <int P, int R, class Store>
void tile(const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, int64_t row, const Store& result) {
    Vec out[P][R];
    if (x.is_int8)
        tile_int8<P, R>(m, panel, x, rows + row, out);
    else if (m.kind == BF16)
        tile_bf16<P, R>(m, panel, x, rows + row, out);
    else
        tile_fp32<P, R>(m, panel, x, rows + row, out);
    for (int p = 0; p < P && m.bias; ++p)
        for (int r = 0; r < R; ++r) out[p][r] += load(m.bias + (panel + p) * LANES);
    for (int r = 0; r < R; ++r) result.template take<P>(panel, row + r, [&](int p) { return out[p][r]; });
}

template <int P, class Store>
void tiles(
    const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, int64_t row, int64_t end, const Store& result
) {
    for (; end - row >= 8; row += 8) tile<P, 8>(m, panel, x, rows, row, result);
    switch (end - row) {
        case 7: return tile<P, 7>(m, panel, x, rows, row, result);
        case 6: return tile<P, 6>(m, panel, x, rows, row, result);
        case 5: return tile<P, 5>(m, panel, x, rows, row, result);
        case 4: return tile<P, 4>(m, panel, x, rows, row, result);
        case 3: return tile<P, 3>(m, panel, x, rows, row, result);
        case 2: return tile<P, 2>(m, panel, x, rows, row, result);
        case 1: return tile<P, 1>(m, panel, x, rows, row, result);
    }
}

// Panels first .. last - 1, an even number of them where results are taken in pairs, times inputs rows[0 .. count - 1].
template <class Store>
void multiply(
    const Matrix& m, int64_t first, int64_t last, const Inputs& x, const int32_t* rows, int64_t count, const Store& result
) {
    if (count == 1) {
        int64_t panel = first;
        for (; last - panel >= 8; panel += 8) tile<8, 1>(m, panel, x, rows, 0, result);
        for (; last - panel >= 2; panel += 2) tile<2, 1>(m, panel, x, rows, 0, result);
        if (panel < last) tile<1, 1>(m, panel, x, rows, 0, result);
        return;
    }
    // Many rows in pieces that stay in the cache while all panels go by.
    const int64_t piece = std::max<int64_t>(8, CACHED_BYTES / (x.width * (x.is_int8 ? 1 : 4)) / 8 * 8);
    for (int64_t row = 0; row < count; row += piece) {
        const int64_t end = std::min(row + piece, count);
        int64_t panel = first;
        if (count <= 4)
            for (; last - panel >= 4; panel += 4) tiles<4>(m, panel, x, rows, row, end, result);
        for (; last - panel >= 2; panel += 2) tiles<2>(m, panel, x, rows, row, end, result);
        if (panel < last) tiles<1>(m, panel, x, rows, row, end, result);
    }
}

// What becomes of a product's row `row` in panels `panel` .. `panel` + P - 1.
struct Write {
    float* out;
    int64_t width;
    template <int P, class Value>
    void take(int64_t panel, int64_t row, const Value& value) const {
        for (int p = 0; p < P; ++p) store(out + row * width + (panel + p) * LANES, value(p));
    }
};

struct WriteLogits {
    float* out;
    int64_t vocab;
    template <int P, class Value>
    void take(int64_t panel, int64_t row, const Value& value) const {
        for (int p = 0; p < P; ++p) {
            float values[LANES];
            store(values, value(p));
            const int64_t start = (panel + p) * LANES;
            std::copy_n(values, std::min(LANES, vocab - start), out + row * vocab + start);
        }
    }
};

struct AddToHidden {
    float* hidden;
    int64_t width;
    const int32_t* rows;
    template <int P, class Value>
    void take(int64_t panel, int64_t row, const Value& value) const {
        for (int p = 0; p < P; ++p) {
            float* const h = hidden + rows[row] * width + (panel + p) * LANES;
            store(h, load(h) + value(p));
        }
    }
};

struct WriteGated {
    float* out;
    int64_t width;
    template <int P, class Value>
    void take(int64_t panel, int64_t row, const Value& value) const {
        static_assert(P % 2 == 0 || P == 1, "gates come with their values");
        if constexpr (P % 2 == 0)
            for (int p = 0; p < P; p += 2)
                store(out + row * width + (panel + p) / 2 * LANES, silu(value(p)) * value(p + 1));
    }
};

}  // namespace buddy
