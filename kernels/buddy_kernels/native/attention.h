// Norms, rotation, and attention of some queries over their sequence's blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "interface.h"
#include "micro_kernels.h"
#include "vector.h"

namespace buddy {

void rms_norm(const float* x, const float* weight, int64_t dim, int64_t width, double eps, float* out) {
    Vec squares = Vec{};
    for (int64_t i = 0; i < width; i += LANES) squares += load(x + i) * load(x + i);
    const float inverse = 1.f / std::sqrt(sum(squares) / static_cast<float>(dim) + static_cast<float>(eps));
    for (int64_t i = 0; i < width; i += LANES) store(out + i, load(weight + i) * (load(x + i) * inverse));
}

// A head's norm, if it has one, and its rotation; dim floats, into `out`.
void normed_and_rotated(
    const float* x, const float* weight, int64_t dim, double eps, const float* cos, const float* sin, float* out
) {
    float normed[MAX_HEAD_DIM];
    if (weight) {
        float squares = 0.f;
        for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
        const float inverse = 1.f / std::sqrt(squares / static_cast<float>(dim) + static_cast<float>(eps));
        for (int64_t i = 0; i < dim; ++i) normed[i] = weight[i] * (x[i] * inverse);
        x = normed;
    }
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        out[i] = x[i] * cos[i] - x[i + half] * sin[i];
        out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
}

// As fp32 or rounded to bf16.
inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = to_bf16(x); }
inline void put(float* to, Vec x) { store(to, x); }
inline void put(uint16_t* to, Vec x) { store(to, to_bf16(x)); }

// One row's head and where its sum goes. It sees positions first .. last.
struct Query {
    int64_t first, last;
    float* out;
};

// What queries of a key/value head see: their sequence's blocks of 16 tokens. A block's K are a panel of 16 keys and
// head_dim inputs, its V are panels of 16 of head_dim outputs and 16 inputs, the tokens.
struct KeysAndValues {
    const void *k, *v;  // of this head, in the cache's first block
    const int64_t* table;
    int64_t head_dim, block_stride_k, block_stride_v;  // the strides in elements
    float scale;
};

// At most MOST_QUERIES, whose rotated states are [query][head_dim]. `scores` has room for [query][scores_width].
using Attend = void(
    const KeysAndValues& seen, const Query* queries, int64_t num_queries, const float* q, float* scores, int64_t scores_width
);

constexpr int64_t MOST_QUERIES = 8;  // that read keys and values together

// The panel of 16 tokens whose later ones, from `end` on, are zeros: those were never written, or are another
// sequence's, and may be no numbers.
template <class Way>
void copy_until(const typename Way::Weight* panel, int64_t end, typename Way::Weight* to) {
    constexpr int64_t TOGETHER = Way::TOGETHER;
    const int64_t whole = end / TOGETHER * TOGETHER;
    std::copy_n(panel, whole * LANES, to);
    std::fill(to + whole * LANES, to + LANES * LANES, typename Way::Weight{0});
    for (int64_t i = 0; i < LANES && whole < end; ++i) to[whole * LANES + i * TOGETHER] = panel[whole * LANES + i * TOGETHER];
}

// What one of the queries may not see weighs nothing: its sums are the same in whatever company it comes, as long as the
// company's V are numbers.
template <class Way, int Q>
void attend(const KeysAndValues& seen, const Query* queries, const float* q, float* scores, int64_t scores_width) {
    using Weight = typename Way::Weight;
    using Input = typename Way::Input;
    constexpr int P = Q <= 4 ? 4 : 2;  // panels at a time, so that enough sums are under way
    int64_t first = queries[0].first, last = queries[0].last;
    for (int i = 1; i < Q; ++i) first = std::min(first, queries[i].first), last = std::max(last, queries[i].last);
    const int64_t first_block = first / LANES, last_block = last / LANES;

    Input states[Q * MAX_HEAD_DIM];
    const Input* rows[Q];
    for (int64_t i = 0; i < Q * seen.head_dim; ++i) put(states + i, q[i]);
    for (int i = 0; i < Q; ++i) rows[i] = states + i * seen.head_dim;
    const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Vec most[Q];
    for (int i = 0; i < Q; ++i) most[i] = splat(-INFINITY);
    for (int64_t block = first_block; block <= last_block; block += P) {
        const Weight* keys[P];
        for (int p = 0; p < P; ++p)
            keys[p] = static_cast<const Weight*>(seen.k) + seen.table[std::min(block + p, last_block)] * seen.block_stride_k;
        Vec products[P][Q] = {};
        Way::template sum<0>(keys, rows, seen.head_dim, products);
        for (int p = 0; p < P && block + p <= last_block; ++p) {
            const Vec position = lane + static_cast<float>((block + p) * LANES);
            for (int i = 0; i < Q; ++i) {
                const VecI unseen =
                    (position < static_cast<float>(queries[i].first)) | (position > static_cast<float>(queries[i].last));
                const Vec score = unseen ? splat(-INFINITY) : products[p][i] * seen.scale;
                store(scores + i * scores_width + (block + p - first_block) * LANES, score);
                most[i] = max(most[i], score);
            }
        }
    }

    // Weights take the scores' place as inputs of the next product.
    const int64_t num_scores = (last_block - first_block + 1) * LANES;
    float inverse[Q];
    for (int i = 0; i < Q; ++i) {
        const float top = largest(most[i]);
        const float* const of_query = scores + i * scores_width;
        auto* const weights = reinterpret_cast<Input*>(scores + i * scores_width);
        Vec total = Vec{};
        for (int64_t j = 0; j < num_scores; j += LANES) {
            const Vec score = load(of_query + j), weight = score == -INFINITY ? Vec{} : exp(score - top);
            put(weights + j, weight);
            total += weight;
        }
        inverse[i] = 1.f / sum(total);
        rows[i] = weights;
    }

    const int64_t num_panels = padded(seen.head_dim, LANES) / LANES;
    for (int64_t panel = 0; panel < num_panels; panel += P) {
        Vec totals[P][Q] = {};
        Weight written[P][LANES * LANES];
        for (int64_t block = first_block; block <= last_block; ++block) {
            const Weight* values[P];
            const Input* weights[Q];
            for (int p = 0; p < P; ++p) {
                values[p] = static_cast<const Weight*>(seen.v) + seen.table[block] * seen.block_stride_v +
                            std::min(panel + p, num_panels - 1) * LANES * LANES;
                if (block == last_block) copy_until<Way>(values[p], last % LANES + 1, written[p]), values[p] = written[p];
            }
            for (int i = 0; i < Q; ++i) weights[i] = rows[i] + (block - first_block) * LANES;
            Way::template sum<0>(values, weights, LANES, totals);
        }
        for (int p = 0; p < P && panel + p < num_panels; ++p) {
            const int64_t d = (panel + p) * LANES;
            for (int i = 0; i < Q; ++i) {
                float values[LANES];
                store(values, totals[p][i] * inverse[i]);
                std::copy_n(values, std::min(LANES, seen.head_dim - d), queries[i].out + d);
            }
        }
    }
}

template <class Way, int Q = MOST_QUERIES>
void attend_some(
    const KeysAndValues& seen, const Query* queries, int64_t num_queries, const float* q, float* scores, int64_t scores_width
) {
    if constexpr (Q > 1)
        if (num_queries < Q) return attend_some<Way, Q - 1>(seen, queries, num_queries, q, scores, scores_width);
    attend<Way, Q>(seen, queries, q, scores, scores_width);
}

}  // namespace buddy
