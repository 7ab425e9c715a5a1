// Packed weights times rows, and what becomes of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "inputs.h"
#include "interface.h"
#include "micro_kernels.h"
#include "vector.h"

namespace buddy {

constexpr int64_t CACHED_BYTES = 1 << 20;  // of inputs, which stay in the cache while panels are streamed
constexpr int64_t SIDE_BY_SIDE = 2;        // panels stored together; threads take whole pairs
constexpr int64_t MOST_ROWS = 8;           // of a tile
constexpr int64_t MOST_SUMS = 2 * MOST_ROWS * LANES;
// Of weights on their way from memory. The processor's own fetching ahead starts anew at every page of 4 KiB.
constexpr int AHEAD_BYTES = 4096;

// Panels `panel` ..: 8 of them times one row of x, 4 times at most 4, or 2 times at most MOST_ROWS, into sums
// [row][panel][16].
using SumTile = void(
    const Matrix& m, int64_t panel, int64_t num_panels, const Inputs& x, const int32_t* rows, int64_t num_rows, float* sums
);

// P panels and num_rows rows, at most R. The sums stay in registers.
template <class Way, int P, int R>
void sum_rows(const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, int64_t num_rows, float* sums) {
    if constexpr (R > 1)
        if (num_rows < R) return sum_rows<Way, P, R - 1>(m, panel, x, rows, num_rows, sums);
    using Weight = typename Way::Weight;
    constexpr int AHEAD = AHEAD_BYTES * SIDE_BY_SIDE / P;
    Vec out[P][R] = {};
    // Where a panel's weights for one input, or those together, begin.
    const auto at = [panel](int p, int64_t num_inputs, int64_t together) {
        return (panel + p) / SIDE_BY_SIDE * SIDE_BY_SIDE * LANES * num_inputs + p % SIDE_BY_SIDE * LANES * together;
    };
    const Weight* panels[P];
    for (int p = 0; p < P; ++p)
        panels[p] = reinterpret_cast<const Weight*>(m.panels) + at(p, m.inputs, Way::TOGETHER);
    if constexpr (std::is_same_v<Way, DotInt8>) {
        const float* scales[P];
        for (int p = 0; p < P; ++p) scales[p] = m.scales + at(p, m.inputs / PAD, 1);
        Way::template sum<SIDE_BY_SIDE, AHEAD>(panels, scales, x, rows, out);
    } else {
        const typename Way::Input* in[R];
        for (int r = 0; r < R; ++r) in[r] = x.row<typename Way::Input>(rows[r]);
        Way::template sum<SIDE_BY_SIDE, AHEAD>(panels, in, m.inputs, out);
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) store(sums + (r * P + p) * LANES, out[p][r]);
}

template <class Way>
void sum_tile(
    const Matrix& m, int64_t panel, int64_t num_panels, const Inputs& x, const int32_t* rows, int64_t num_rows, float* sums
) {
    switch (num_panels) {
        case 8: return sum_rows<Way, 8, 1>(m, panel, x, rows, num_rows, sums);
        case 4: return sum_rows<Way, 4, 4>(m, panel, x, rows, num_rows, sums);
        case 2: return sum_rows<Way, 2, MOST_ROWS>(m, panel, x, rows, num_rows, sums);
    }
}

// Panels first .. last - 1, both even, times inputs rows[0 .. count - 1].
template <class Store>
void multiply(
    SumTile* sum_tile, const Matrix& m, int64_t first, int64_t last, const Inputs& x, const int32_t* rows, int64_t count,
    const Store& result
) {
    // Few rows: more panels, so that enough sums are under way at a time.
    const int64_t most_panels = count == 1 ? 8 : count <= 4 ? 4 : 2;
    // Many rows in pieces that stay in the cache while all panels go by.
    const int64_t row_bytes = x.width * (x.kind == FP32 ? 4 : x.kind == BF16 ? 2 : 1);
    const int64_t piece = std::max<int64_t>(1, CACHED_BYTES / row_bytes / MOST_ROWS) * MOST_ROWS;
    alignas(64) float sums[MOST_SUMS];
    for (int64_t start = 0; start < count; start += piece) {
        const int64_t end = std::min(start + piece, count);
        for (int64_t panel = first, num_panels = most_panels; panel < last; panel += num_panels) {
            while (num_panels > last - panel) num_panels /= 2;
            for (int64_t row = start; row < end; row += MOST_ROWS) {
                const int64_t num_rows = std::min(MOST_ROWS, end - row);
                sum_tile(m, panel, num_panels, x, rows + row, num_rows, sums);
                for (int64_t i = 0; i < num_rows; ++i) {
                    float* const of_row = sums + i * num_panels * LANES;
                    if (m.bias) add(of_row, m.bias + panel * LANES, num_panels * LANES);
                    result.take(panel, num_panels, row + i, of_row);
                }
            }
        }
    }
}

// What becomes of a product's row `row` in panels `panel` .. `panel` + num_panels - 1.
struct Write {
    float* out;
    int64_t width;
    void take(int64_t panel, int64_t num_panels, int64_t row, const float* sums) const {
        std::copy_n(sums, num_panels * LANES, out + row * width + panel * LANES);
    }
};

struct WriteLogits {
    float* out;
    int64_t vocab;
    void take(int64_t panel, int64_t num_panels, int64_t row, const float* sums) const {
        const int64_t start = panel * LANES;
        std::copy_n(sums, std::min(num_panels * LANES, vocab - start), out + row * vocab + start);
    }
};

struct AddToHidden {
    float* hidden;
    int64_t width;
    const int32_t* rows;
    void take(int64_t panel, int64_t num_panels, int64_t row, const float* sums) const {
        add(hidden + rows[row] * width + panel * LANES, sums, num_panels * LANES);
    }
};

// Panels of gates and of values take turns.
struct WriteGated {
    float* out;
    int64_t width;
    void take(int64_t panel, int64_t num_panels, int64_t row, const float* sums) const {
        for (int64_t p = 0; p < num_panels; p += 2)
            store(out + row * width + (panel + p) / 2 * LANES, silu(load(sums + p * LANES)) * load(sums + (p + 1) * LANES));
    }
};

}  // namespace buddy
