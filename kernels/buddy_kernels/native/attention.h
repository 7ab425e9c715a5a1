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

// Q queries that read keys and values together. What one of them may not see weighs nothing: its sums are the same in
// whatever company it comes, as long as the V of the tokens it may not see are finite.
template <class Way, int Q>
class Attention {
    using Weight = typename Way::Weight;
    using Input = typename Way::Input;

  public:
    Attention(const KeysAndValues& seen, const Query* queries, float* scores, int64_t scores_width)
        : seen(seen), queries(queries), scores(scores), scores_width(scores_width) {
        int64_t first = queries[0].first;
        last = queries[0].last;
        for (int i = 1; i < Q; ++i) first = std::min(first, queries[i].first), last = std::max(last, queries[i].last);
        first_block = first / LANES, last_block = last / LANES;
    }

    void run(const float* q) {
        Input states[Q * MAX_HEAD_DIM];
        for (int64_t i = 0; i < Q * seen.head_dim; ++i) put(states + i, q[i]);
        for (int i = 0; i < Q; ++i) inputs[i] = states + i * seen.head_dim, most[i] = splat(-INFINITY);
        by_fours(first_block, last_block + 1, [&]<int P>(int64_t block) { score<P>(block); });
        for (int i = 0; i < Q; ++i) weigh(i);
        by_fours(0, padded(seen.head_dim, LANES) / LANES, [&]<int P>(int64_t panel) { add_values<P>(panel); });
    }

  private:
    // Four panels at a time, or two: enough sums are under way, and few of panels that are not there.
    template <class Some>
    static void by_fours(int64_t panel, int64_t end, const Some& some) {
        if constexpr (Q <= 4)
            for (; end - panel > 2; panel += 4) some.template operator()<4>(panel);
        for (; panel < end; panel += 2) some.template operator()<2>(panel);
    }

    template <int P>
    void score(int64_t block) {
        const Weight* keys[P];
        for (int p = 0; p < P; ++p)
            keys[p] = static_cast<const Weight*>(seen.k) + seen.table[std::min(block + p, last_block)] * seen.block_stride_k;
        Vec products[P][Q] = {};
        Way::template sum<1, 0>(keys, inputs, seen.head_dim, products);
        const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
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

    // A query's weights take the place of its scores, as inputs of the next product.
    void weigh(int i) {
        float* const of_query = scores + i * scores_width;
        auto* const weights = reinterpret_cast<Input*>(of_query);
        const float top = largest(most[i]);
        Vec total = Vec{};
        for (int64_t j = 0; j < (last_block - first_block + 1) * LANES; j += LANES) {
            const Vec score = load(of_query + j), weight = score == -INFINITY ? Vec{} : exp(score - top);
            put(weights + j, weight);
            total += weight;
        }
        inverse[i] = 1.f / sum(total);
        inputs[i] = weights;
    }

    template <int P>
    void add_values(int64_t panel) {
        const int64_t num_panels = std::min<int64_t>(P, padded(seen.head_dim, LANES) / LANES - panel);
        const auto panel_of = [&](int64_t block, int64_t p) {
            return static_cast<const Weight*>(seen.v) + seen.table[block] * seen.block_stride_v + (panel + p) * LANES * LANES;
        };
        Weight written[P][LANES * LANES];
        for (int64_t p = 0; p < num_panels; ++p) copy_until<Way>(panel_of(last_block, p), last % LANES + 1, written[p]);
        Vec totals[P][Q] = {};
        for (int64_t block = first_block; block <= last_block; ++block) {
            const Weight* values[P];
            const Input* weights[Q];
            for (int64_t p = 0; p < P; ++p) {
                const int64_t there = std::min(p, num_panels - 1);
                values[p] = block < last_block ? panel_of(block, there) : written[there];
            }
            for (int i = 0; i < Q; ++i) weights[i] = inputs[i] + (block - first_block) * LANES;
            Way::template sum<1, 0>(values, weights, LANES, totals);
        }
        for (int64_t p = 0; p < num_panels; ++p) {
            const int64_t d = (panel + p) * LANES;
            for (int i = 0; i < Q; ++i) {
                float values[LANES];
                store(values, totals[p][i] * inverse[i]);
                std::copy_n(values, std::min(LANES, seen.head_dim - d), queries[i].out + d);
            }
        }
    }

    const KeysAndValues& seen;
    const Query* const queries;
    float* const scores;
    const int64_t scores_width;
    int64_t last, first_block, last_block;
    const Input* inputs[Q];
    Vec most[Q];
    float inverse[Q];
};

template <class Way, int Q = MOST_QUERIES>
void attend(
    const KeysAndValues& seen, const Query* queries, int64_t num_queries, const float* q, float* scores, int64_t scores_width
) {
    if constexpr (Q > 1)
        if (num_queries < Q) return attend<Way, Q - 1>(seen, queries, num_queries, q, scores, scores_width);
    Attention<Way, Q>(seen, queries, scores, scores_width).run(q);
}

}  // namespace buddy
