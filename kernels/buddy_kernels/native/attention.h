// Norms, rotation, and attention of some queries over their sequence's blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "interface.h"
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

template <class Element>
inline void put(Element* to, float x);
template <>
inline void put(float* to, float x) { *to = x; }
template <>
inline void put(uint16_t* to, float x) { *to = to_bf16(x); }

// One row's head and where its sum goes. It sees positions first .. last.
struct Query {
    int64_t first, last;
    float* out;
};

// Q queries of one sequence that share a key/value head, over its blocks of 16. What one of them may not see weighs
// nothing: its sums are the same in whatever company it comes, as long as the company's V are numbers.
template <int Q, class Element>
void attend(
    const Element* k, const Element* v, const int64_t* table, int64_t block_stride_k, int64_t block_stride_v,
    const Query* queries, const float* q, int64_t head_dim, int64_t v_width, float scale, float* scores, int64_t scores_width
) {
    int64_t first = queries[0].first, last = queries[0].last;
    for (int i = 1; i < Q; ++i) first = std::min(first, queries[i].first), last = std::max(last, queries[i].last);
    const int64_t first_block = first / LANES, last_block = last / LANES;
    const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Vec most[Q];
    for (int i = 0; i < Q; ++i) most[i] = splat(-INFINITY);
    for (int64_t block = first_block; block <= last_block; ++block) {
        const Element* const keys = k + table[block] * block_stride_k;
        Vec even[Q] = {}, odd[Q] = {};
        for (int64_t d = 0; d < head_dim; d += 2) {
            const Vec key = load(keys + d * LANES), next = load(keys + (d + 1) * LANES);
            for (int i = 0; i < Q; ++i) {
                even[i] += key * q[i * head_dim + d];
                odd[i] += next * q[i * head_dim + d + 1];
            }
        }
        const Vec position = lane + static_cast<float>(block * LANES);
        for (int i = 0; i < Q; ++i) {
            const VecI unseen =
                (position < static_cast<float>(queries[i].first)) | (position > static_cast<float>(queries[i].last));
            const Vec score = unseen ? splat(-INFINITY) : (even[i] + odd[i]) * scale;
            store(scores + i * scores_width + (block - first_block) * LANES, score);
            most[i] = max(most[i], score);
        }
    }
    const int64_t num_scores = (last_block - first_block + 1) * LANES;
    float inverse[Q];
    for (int i = 0; i < Q; ++i) {
        const float top = largest(most[i]);
        Vec total = Vec{};
        for (int64_t j = 0; j < num_scores; j += LANES) {
            float* const at = scores + i * scores_width + j;
            const Vec score = load(at), weight = score == -INFINITY ? Vec{} : exp(score - top);
            store(at, weight);
            total += weight;
        }
        inverse[i] = 1.f / sum(total);
    }
    const auto add = [scores_width](Vec(&totals)[Q], const Element* value, const float* weights) {
        for (int i = 0; i < Q; ++i) totals[i] += load(value) * weights[i * scores_width];
    };
    for (int64_t d = 0; d < v_width; d += LANES) {
        Vec even[Q] = {}, odd[Q] = {};
        for (int64_t block = first_block; block <= last_block; ++block) {
            const Element* const values = v + table[block] * block_stride_v + d;
            const float* const weights = scores + (block - first_block) * LANES;
            // What was never written, or is another sequence's, is not read: it may be no number.
            int64_t t = block == first_block ? first % LANES : 0;
            const int64_t end = block == last_block ? last % LANES + 1 : LANES;
            if (t % 2) add(odd, values + t * v_width, weights + t), ++t;
            for (; t + 1 < end; t += 2) {
                add(even, values + t * v_width, weights + t);
                add(odd, values + (t + 1) * v_width, weights + t + 1);
            }
            if (t < end) add(even, values + t * v_width, weights + t);
        }
        for (int i = 0; i < Q; ++i) {
            float values[LANES];
            store(values, (even[i] + odd[i]) * inverse[i]);
            std::copy_n(values, std::min(LANES, head_dim - d), queries[i].out + d);
        }
    }
}

}  // namespace buddy
