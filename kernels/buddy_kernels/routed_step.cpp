// One step of a routed decoder on a CPU: every layer, the router's choice after the first layer's V, and the head.
//
// A row's result does not depend on the rows beside it: every output is summed over its inputs in one fixed order,
// whatever the batch and the number of threads. Weights come packed in panels of 16 outputs (packing.py), so that a
// product is loads, broadcasts and fused multiply-adds. Threads share the outputs of a product and meet five times a
// layer. Without torch's headers: it compiles in seconds, and every pointer is a tensor's that Python keeps alive.
//
// N rows, M of them run a layer, S segments, D model dim, L layers, Hq query heads, Hkv key/value heads, G = Hq / Hkv,
// Dh head dim, F = Hkv x Dh. Every row of floats is padded with zeros to a multiple of 64.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int64_t LANES = 16;   // outputs in a panel, and tokens in a block of the cache
constexpr int64_t PAD = 64;     // floats a row is padded to, and inputs that share a scale in int8
constexpr int BETWEEN_STEPS = 10000;  // spins, about half a millisecond: the next step is seldom further away
constexpr int64_t ALONE = 4;    // up to so many rows every thread prepares its own inputs rather than wait

inline int64_t padded(int64_t n, int64_t to = PAD) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------------------------------------------- 16 floats at once

typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t VecU __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t VecH __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t VecB __attribute__((vector_size(16), aligned(1), may_alias));

inline Vec splat(float x) { return Vec{} + x; }
inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const uint16_t* p) {
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const VecH*>(p), VecU) << 16);
}
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline VecU to_bf16_bits(Vec x) {
    const VecU bits = (VecU)x;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
}
inline void store(uint16_t* p, Vec x) {
    *reinterpret_cast<VecH*>(p) = __builtin_convertvector(to_bf16_bits(x), VecH);
}
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float round_to_bf16(float x) {
    const uint32_t bits = static_cast<uint32_t>(to_bf16(x)) << 16;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float sum(Vec x) {
    float s[LANES];
    store(s, x);
    for (int64_t width = LANES / 2; width; width /= 2)
        for (int64_t i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline float largest(Vec x) {
    float s[LANES];
    store(s, x);
    return *std::max_element(s, s + LANES);
}

// Cephes' expf: powers of two, and a polynomial between.
inline Vec exp(Vec x) {
    const Vec low = splat(-87.3f), high = splat(88.3f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec shifted = x * 1.44269504088896341f + 12582912.f;  // rounds to an integer in the low bits
    const Vec n = shifted - 12582912.f;
    const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return (Vec)((VecI)p + (((VecI)shifted - 0x4b400000) << 23));
}
inline Vec silu(Vec x) { return x / (1.f + exp(-x)); }

// -------------------------------------------------------------------------------------------- what Python hands over

enum Kind : int64_t { FP32 = 0, BF16 = 1, INT8 = 2 };

extern "C" {

// [outputs, inputs] in panels of 16 outputs. fp32: [panel][input][16]. bf16: [panel][input / 2][16][2]. int8:
// [panel][input / 4][16][4], stored as value + 128, and scales [panel][input / 64][16].
struct Matrix {
    const char* panels;
    const float* bias;    // [outputs], padded; or null
    const float* scales;  // int8 only
    int64_t outputs, inputs;
};

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two null without norms of heads
    Matrix q, kv, o, gate_up, down;                         // kv: K's outputs, then V's; gate_up: panels in turn
    void *k, *v;                                            // cache: [block][Hkv][Dh][16], [block][Hkv][16][Dh padded to 16]
    int64_t window;                                         // 0: all
};

struct Model {
    int64_t kind, cache_kind, num_layers, dim, num_heads, num_kv_heads, head_dim, mlp_dim, vocab, num_threads;
    double eps, scale, attention_factor;
    const float* inv_freq;
    const void* embeddings;  // fp32 or bf16 as cache_kind
    const float* norm;
    Matrix head;
    const Layer* layers;
};

// How paths are chosen. `choose` null: by scores = prior + up(silu(down(features))), without `down` by the prior alone.
struct Router {
    const float *down, *down_bias, *up, *up_bias, *prior;
    int64_t num_features, rank;
    double* sums;        // [lanes, F] running sums of V
    int8_t* last_masks;  // [lanes, L]
};

struct Step {
    int64_t num_rows, num_segments, num_wanted, table_width;
    const int64_t *tokens, *positions, *lengths, *tables, *lanes, *budgets, *wanted;
    const uint8_t* reroutes;
    int8_t* masks;        // [S, L], written
    float* logits;        // [wanted, V], written
    float* first_v;       // [N, F], written for `choose`
    void (*choose)();     // writes the masks; null: the router does
    double router_s;      // written
};

}  // extern "C"

// ------------------------------------------------------------------------------------------------ a product's inputs

// Rows as products read them: fp32; bf16; or int8 with a scale and a sum for every 64.
struct Inputs {
    int64_t kind = FP32, width = 0;
    std::vector<float> fp32;
    std::vector<uint16_t> bf16;
    std::vector<int8_t> int8;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    void shape(int64_t rows, int64_t new_width, int64_t new_kind) {
        kind = new_kind, width = new_width;
        const auto grow = [](auto& buffer, int64_t size) {
            if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
        };
        if (kind == FP32) grow(fp32, rows * width);
        if (kind == BF16) grow(bf16, rows * width);
        if (kind == INT8) grow(int8, rows * width), grow(scales, rows * width / PAD), grow(sums, rows * width / PAD);
    }

    void set(int64_t row, const float* x) {
        if (kind == FP32) {
            std::copy_n(x, width, &fp32[row * width]);
        } else if (kind == BF16) {
            for (int64_t i = 0; i < width; i += LANES) store(&bf16[row * width + i], load(x + i));
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

// --------------------------------------------------------------------------------------------------------- the product

// P panels times R rows into `out`. Each output is one accumulator that takes its inputs in order, so P and R do not
// show in the result.
template <int P, int R>
inline void tile_fp32(const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, Vec (&out)[P][R]) {
    const float* w[P];
    const float* in[R];
    for (int p = 0; p < P; ++p) w[p] = reinterpret_cast<const float*>(m.panels) + (panel + p) * m.inputs * LANES;
    for (int r = 0; r < R; ++r) in[r] = &x.fp32[rows[r] * x.width];
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r) out[p][r] = Vec{};
    for (int64_t i = 0; i < m.inputs; ++i) {
        Vec weight[P];
        for (int p = 0; p < P; ++p) weight[p] = load(w[p] + i * LANES);
        for (int r = 0; r < R; ++r) {
            const Vec value = splat(in[r][i]);
            for (int p = 0; p < P; ++p) out[p][r] += weight[p] * value;
        }
    }
}

template <int P, int R>
inline void tile_bf16(const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, Vec (&out)[P][R]) {
    const uint32_t* w[P];
    const uint32_t* in[R];
    const int64_t pairs = m.inputs / 2;
    for (int p = 0; p < P; ++p) w[p] = reinterpret_cast<const uint32_t*>(m.panels) + (panel + p) * pairs * LANES;
    for (int r = 0; r < R; ++r) in[r] = reinterpret_cast<const uint32_t*>(&x.bf16[rows[r] * x.width]);
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < R; ++r) out[p][r] = Vec{};
    for (int64_t i = 0; i < pairs; ++i) {
#if defined(__AVX512BF16__)
        __m512bh weight[P];
        for (int p = 0; p < P; ++p) weight[p] = (__m512bh)_mm512_loadu_si512(w[p] + i * LANES);
        for (int r = 0; r < R; ++r) {
            const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(in[r][i]));
            for (int p = 0; p < P; ++p) out[p][r] = (Vec)_mm512_dpbf16_ps((__m512)out[p][r], weight[p], value);
        }
#else
        Vec first[P], second[P];
        for (int p = 0; p < P; ++p) {
            const VecU both = *reinterpret_cast<const VecU*>(w[p] + i * LANES);
            first[p] = (Vec)(both << 16), second[p] = (Vec)(both & 0xffff0000u);
        }
        for (int r = 0; r < R; ++r) {
            const VecU both = VecU{} + in[r][i];
            for (int p = 0; p < P; ++p) {
                out[p][r] += first[p] * (Vec)(both << 16);
                out[p][r] += second[p] * (Vec)(both & 0xffff0000u);
            }
        }
#endif
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
inline void tile_int8(const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, Vec (&out)[P][R]) {
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
        for (int64_t i = 0; i < PAD / 4; ++i)
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p)
                    total[p][r] = dot_int8(total[p][r], weights + (p * fours + group * PAD / 4 + i) * LANES, in[r][i]);
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
    if (x.kind == FP32)
        tile_fp32<P, R>(m, panel, x, rows + row, out);
    else if (x.kind == BF16)
        tile_bf16<P, R>(m, panel, x, rows + row, out);
    else
        tile_int8<P, R>(m, panel, x, rows + row, out);
    for (int p = 0; p < P && m.bias; ++p)
        for (int r = 0; r < R; ++r) out[p][r] += load(m.bias + (panel + p) * LANES);
    for (int r = 0; r < R; ++r) result.template take<P>(panel, row + r, [&](int p) { return out[p][r]; });
}

template <int P, class Store>
void tiles(const Matrix& m, int64_t panel, const Inputs& x, const int32_t* rows, int64_t count, const Store& result) {
    int64_t row = 0;
    for (; count - row >= 8; row += 8) tile<P, 8>(m, panel, x, rows, row, result);
    switch (count - row) {
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
    int64_t panel = first;
    if (count <= 4)
        for (; last - panel >= 4; panel += 4) tiles<4>(m, panel, x, rows, count, result);
    for (; last - panel >= 2; panel += 2) tiles<2>(m, panel, x, rows, count, result);
    if (panel < last) tiles<1>(m, panel, x, rows, count, result);
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
            float lanes[LANES];
            store(lanes, value(p));
            const int64_t start = (panel + p) * LANES;
            std::copy_n(lanes, std::min(LANES, vocab - start), out + row * vocab + start);
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

// ----------------------------------------------------------------------------------------------------------- the rest

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
    float normed[1024];
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

// G query heads that share a key/value head, over positions first .. last of one sequence, block by block of 16.
template <int G, class Element>
void attend(
    const Element* k, const Element* v, const int64_t* table, int64_t block_stride_k, int64_t block_stride_v,
    int64_t first, int64_t last, const float* q, int64_t head_dim, int64_t v_width, float scale, float* scores,
    int64_t scores_width, float* out
) {
    const int64_t first_block = first / LANES, last_block = last / LANES;
    const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Vec most[G];
    for (int g = 0; g < G; ++g) most[g] = splat(-INFINITY);
    for (int64_t block = first_block; block <= last_block; ++block) {
        const Element* const keys = k + table[block] * block_stride_k;
        Vec even[G] = {}, odd[G] = {};
        for (int64_t d = 0; d < head_dim; d += 2) {
            const Vec key = load(keys + d * LANES), next = load(keys + (d + 1) * LANES);
            for (int g = 0; g < G; ++g) {
                even[g] += key * q[g * head_dim + d];
                odd[g] += next * q[g * head_dim + d + 1];
            }
        }
        const Vec position = lane + static_cast<float>(block * LANES);
        const VecI unseen = (position < static_cast<float>(first)) | (position > static_cast<float>(last));
        for (int g = 0; g < G; ++g) {
            const Vec score = unseen ? splat(-INFINITY) : (even[g] + odd[g]) * scale;
            store(scores + g * scores_width + (block - first_block) * LANES, score);
            most[g] = max(most[g], score);
        }
    }
    const int64_t num_scores = (last_block - first_block + 1) * LANES;
    float inverse[G];
    for (int g = 0; g < G; ++g) {
        const float top = largest(most[g]);
        Vec total = Vec{};
        for (int64_t i = 0; i < num_scores; i += LANES) {
            float* const at = scores + g * scores_width + i;
            const Vec score = load(at), weight = score == -INFINITY ? Vec{} : exp(score - top);
            store(at, weight);
            total += weight;
        }
        inverse[g] = 1.f / sum(total);
    }
    const auto add = [scores_width](Vec(&totals)[G], const Element* value, const float* weights) {
        for (int g = 0; g < G; ++g) totals[g] += load(value) * weights[g * scores_width];
    };
    for (int64_t d = 0; d < v_width; d += LANES) {
        Vec even[G] = {}, odd[G] = {};
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
        for (int g = 0; g < G; ++g) {
            float lanes[LANES];
            store(lanes, (even[g] + odd[g]) * inverse[g]);
            std::copy_n(lanes, std::min(LANES, head_dim - d), out + g * head_dim + d);
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- the step

struct Segment {
    int64_t start, length;
};

class Decoder {
  public:
    explicit Decoder(const Model& model)
        : m(model), layers(model.layers, model.layers + model.num_layers), barrier(m.num_threads), gate(m.num_threads),
          workers(m.num_threads) {
        kv_dim = m.num_kv_heads * m.head_dim;
        width = padded(m.dim);
        q_width = padded(m.num_heads * m.head_dim);
        kv_width = padded(2 * kv_dim);
        mlp_width = padded(m.mlp_dim);
        v_width = padded(m.head_dim, LANES);
        for (int thread = 1; thread < m.num_threads; ++thread) threads.emplace_back([this, thread] { serve(thread); });
    }

    ~Decoder() {
        step = nullptr;
        gate.wait();
        for (std::thread& thread : threads) thread.join();
    }

    Decoder(const Decoder&) = delete;

    void run(Step& new_step, const Router& new_router) {
        prepare(new_step);
        step = &new_step, router = &new_router;
        gate.wait();
        run_thread(*step, *router, 0);
        gate.wait();
    }

  private:
    struct alignas(64) Worker {
        Inputs inputs;
        std::vector<float> normed, q, scores;
    };

    // One of the other threads: step after step, until there is none.
    void serve(int thread) {
        for (;;) {
            gate.wait(BETWEEN_STEPS);
            if (!step) return;
            run_thread(*step, *router, thread);
            gate.wait();
        }
    }

    void prepare(const Step& s) {
        const int64_t n = s.num_rows;
        const auto grow = [](auto& buffer, int64_t size) {
            if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size, 0);
        };
        grow(hidden, n * width);
        grow(q, n * q_width);
        grow(kv, n * kv_width);
        grow(attended, n * q_width);
        grow(gated, n * mlp_width);
        grow(cos, n * m.head_dim / 2);
        grow(sin, n * m.head_dim / 2);
        segment_of_row.resize(n);
        all_rows.resize(n);
        for (int64_t row = 0; row < n; ++row) all_rows[row] = static_cast<int32_t>(row);
        segments.clear();
        int64_t start = 0, longest = 0;
        for (int64_t i = 0; i < s.num_segments; ++i) {
            segments.push_back({start, s.lengths[i]});
            for (int64_t row = start; row < start + s.lengths[i]; ++row)
                segment_of_row[row] = i, longest = std::max(longest, s.positions[row] + 1);
            start += s.lengths[i];
        }
        // A row sees rows of its own step when its sequence has several.
        one_row_each = n == s.num_segments;
        for (int64_t i = 1; i < s.num_segments && one_row_each; ++i)
            for (int64_t j = 0; j < i && one_row_each; ++j) one_row_each = s.lanes[i] != s.lanes[j];
        const int64_t group = m.num_heads / m.num_kv_heads;
        for (Worker& worker : workers) {
            grow(worker.normed, std::max({width, q_width, mlp_width}));
            grow(worker.q, group * m.head_dim);
            grow(worker.scores, group * padded(longest + LANES));
        }
        scores_width = padded(longest + LANES);
    }

    // This thread's share of `count` things.
    std::pair<int64_t, int64_t> share(int64_t count, int thread) const {
        return {count * thread / m.num_threads, count * (thread + 1) / m.num_threads};
    }

    // Inputs of a product: rows[0 .. count - 1] of `x`, normed if there is a weight. Rows of the result are 0 .. count - 1.
    const Inputs& inputs(
        const float* x, int64_t x_width, int64_t dim, const int32_t* rows, int64_t count, const float* norm, int thread
    ) {
        const bool alone = count <= ALONE;
        Inputs& into = alone ? workers[thread].inputs : shared;
        if (alone) {
            into.shape(count, x_width, m.kind);
        } else {
            if (thread == 0) into.shape(count, x_width, m.kind);
            barrier.wait();
        }
        const auto [first, last] = alone ? std::pair<int64_t, int64_t>{0, count} : share(count, thread);
        float* const normed = workers[thread].normed.data();
        for (int64_t i = first; i < last; ++i) {
            const float* const row = x + rows[i] * x_width;
            if (norm) rms_norm(row, norm, dim, x_width, m.eps, normed);
            into.set(i, norm ? normed : row);
        }
        if (!alone) barrier.wait();
        return into;
    }

    template <class Store>
    void product(const Matrix& w, const Inputs& x, int64_t count, int thread, const Store& result, int64_t together = 1) {
        const auto [first, last] = share((w.outputs + LANES * together - 1) / (LANES * together), thread);
        multiply(w, first * together, last * together, x, all_rows.data(), count, result);
    }

    void run_thread(Step& s, const Router& router, int thread) {
        embed(s, thread);
        barrier.wait();
        const int64_t n = s.num_rows;
        for (int64_t index = 0; index < m.num_layers; ++index) {
            const Layer& layer = layers[index];
            const Inputs& normed = inputs(hidden.data(), width, m.dim, all_rows.data(), n, layer.input_norm, thread);
            product(layer.kv, normed, n, thread, Write{kv.data(), kv_width});
            if (index == 0) {
                barrier.wait();
                if (thread == 0) choose(s, router);
                barrier.wait();
            }
            const std::vector<int32_t>& rows = running[index];
            const auto count = static_cast<int64_t>(rows.size());
            const auto [first, last] = share((layer.q.outputs + LANES - 1) / LANES, thread);
            multiply(layer.q, first, last, normed, rows.data(), count, Write{q.data(), q_width});
            barrier.wait();
            if (m.cache_kind == BF16)
                attention<uint16_t>(s, layer, index, thread);
            else
                attention<float>(s, layer, index, thread);
            if (count == 0) {
                barrier.wait();
                continue;
            }
            barrier.wait();
            product(
                layer.o, inputs(attended.data(), q_width, 0, all_rows.data(), count, nullptr, thread), count, thread,
                AddToHidden{hidden.data(), width, rows.data()}
            );
            barrier.wait();
            product(
                layer.gate_up, inputs(hidden.data(), width, m.dim, rows.data(), count, layer.post_norm, thread), count,
                thread, WriteGated{gated.data(), mlp_width}, 2
            );
            barrier.wait();
            product(
                layer.down, inputs(gated.data(), mlp_width, 0, all_rows.data(), count, nullptr, thread), count, thread,
                AddToHidden{hidden.data(), width, rows.data()}
            );
            barrier.wait();
        }
        if (s.num_wanted == 0) return;
        product(
            m.head, inputs(hidden.data(), width, m.dim, wanted.data(), s.num_wanted, m.norm, thread), s.num_wanted, thread,
            WriteLogits{s.logits, m.vocab}
        );
    }

    void embed(const Step& s, int thread) {
        const auto [first, last] = share(s.num_rows, thread);
        const int64_t half = m.head_dim / 2;
        for (int64_t row = first; row < last; ++row) {
            float* const h = &hidden[row * width];
            const int64_t start = s.tokens[row] * m.dim;
            for (int64_t i = 0; i < m.dim; ++i) {
                if (m.cache_kind == BF16) {
                    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(m.embeddings)[start + i]) << 16;
                    std::memcpy(h + i, &bits, 4);
                } else {
                    h[i] = static_cast<const float*>(m.embeddings)[start + i];
                }
            }
            std::fill(h + m.dim, h + width, 0.f);
            for (int64_t i = 0; i < half; ++i) {
                const double angle = static_cast<float>(s.positions[row]) * m.inv_freq[i];
                cos[row * half + i] = static_cast<float>(std::cos(angle) * m.attention_factor);
                sin[row * half + i] = static_cast<float>(std::sin(angle) * m.attention_factor);
            }
        }
        if (thread == 0) wanted.assign(s.wanted, s.wanted + s.num_wanted);
    }

    // ------------------------------------------------------------------------------------------------------ attention

    template <class Element>
    void attention(const Step& s, const Layer& layer, int64_t index, int thread) {
        const int64_t heads = m.num_kv_heads, half = m.head_dim / 2, group = m.num_heads / heads;
        const int64_t k_size = m.head_dim * LANES, v_size = v_width * LANES;
        auto* const k = static_cast<Element*>(layer.k);
        auto* const v = static_cast<Element*>(layer.v);
        const auto write = [&](int64_t row, int64_t head) {
            const int64_t position = s.positions[row], slot = position % LANES;
            const int64_t block = s.tables[segment_of_row[row] * s.table_width + position / LANES];
            float rotated[1024];
            const float* const states = &kv[row * kv_width + head * m.head_dim];
            normed_and_rotated(states, layer.k_norm, m.head_dim, m.eps, &cos[row * half], &sin[row * half], rotated);
            Element* const key = k + (block * heads + head) * k_size + slot;
            Element* const value = v + (block * heads + head) * v_size + slot * v_width;
            for (int64_t d = 0; d < m.head_dim; ++d) {
                put(key + d * LANES, rotated[d]);
                put(value + d, states[kv_dim + d]);
            }
        };
        const std::vector<int32_t>& rows = running[index];
        if (one_row_each) {
            // Nobody else looks at what this thread's head of this row has written.
            const std::vector<int32_t>& place = place_of_row[index];
            const int64_t items = s.num_rows * heads;
            for (int64_t item = thread; item < items; item += m.num_threads) {
                const int64_t row = item / heads, head = item % heads;
                write(row, head);
                if (place[row] >= 0) attend_row<Element>(s, layer, row, place[row], head, group, k, v, thread);
            }
            return;
        }
        const auto [first, last] = share(s.num_rows * heads, thread);
        for (int64_t item = first; item < last; ++item) write(item / heads, item % heads);
        barrier.wait();
        const int64_t items = static_cast<int64_t>(rows.size()) * heads;
        for (int64_t item = thread; item < items; item += m.num_threads) {
            // Heads first, so that a thread's next row finds the keys in its cache; every other row, so that shares are even.
            const auto count = static_cast<int64_t>(rows.size());
            attend_row<Element>(s, layer, rows[item % count], item % count, item / count, group, k, v, thread);
        }
    }

    template <class Element>
    void attend_row(
        const Step& s, const Layer& layer, int64_t row, int64_t place, int64_t head, int64_t group, const Element* k,
        const Element* v, int thread
    ) {
        const int64_t half = m.head_dim / 2, heads = m.num_kv_heads;
        const int64_t k_size = m.head_dim * LANES, v_size = v_width * LANES;
        const int64_t last = s.positions[row], first = layer.window ? std::max<int64_t>(0, last - layer.window + 1) : 0;
        const int64_t* const table = s.tables + segment_of_row[row] * s.table_width;
        Worker& worker = workers[thread];
        const float* const of_row = &q[place * q_width + head * group * m.head_dim];
        for (int64_t g = 0; g < group; ++g)
            normed_and_rotated(
                of_row + g * m.head_dim, layer.q_norm, m.head_dim, m.eps, &cos[row * half], &sin[row * half],
                &worker.q[g * m.head_dim]
            );
        float* const out = &attended[place * q_width + head * group * m.head_dim];
        const auto some = [&]<int G>(int64_t g) {
            attend<G>(
                k + head * k_size, v + head * v_size, table, heads * k_size, heads * v_size, first, last,
                &worker.q[g * m.head_dim], m.head_dim, v_width, static_cast<float>(m.scale), worker.scores.data(),
                scores_width, out + g * m.head_dim
            );
        };
        int64_t g = 0;
        for (; group - g >= 4; g += 4) some.template operator()<4>(g);
        switch (group - g) {
            case 3: return some.template operator()<3>(g);
            case 2: return some.template operator()<2>(g);
            case 1: return some.template operator()<1>(g);
        }
    }

    // -------------------------------------------------------------------------------------------------------- routing

    void choose(Step& s, const Router& router) {
        const auto started = std::chrono::steady_clock::now();
        if (s.choose) {
            for (int64_t row = 0; row < s.num_rows; ++row)
                for (int64_t i = 0; i < kv_dim; ++i) s.first_v[row * kv_dim + i] = state(row, i);
            s.choose();
        } else {
            for (int64_t i = 0; i < s.num_segments; ++i) choose_for(s, router, i);
        }
        running.resize(m.num_layers);
        place_of_row.resize(m.num_layers);
        for (int64_t layer = 0; layer < m.num_layers; ++layer) {
            running[layer].clear();
            place_of_row[layer].assign(s.num_rows, -1);
            for (int64_t i = 0; i < s.num_segments; ++i) {
                if (s.masks[i * m.num_layers + layer] <= 0) continue;
                for (int64_t row = segments[i].start; row < segments[i].start + segments[i].length; ++row) {
                    place_of_row[layer][row] = static_cast<int32_t>(running[layer].size());
                    running[layer].push_back(static_cast<int32_t>(row));
                }
            }
        }
        s.router_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    }

    // The first layer's V as the cache has it.
    float state(int64_t row, int64_t i) const {
        const float x = kv[row * kv_width + kv_dim + i];
        return m.cache_kind == BF16 ? round_to_bf16(x) : x;
    }

    void choose_for(Step& s, const Router& router, int64_t segment) {
        const auto [start, length] = segments[segment];
        const int64_t lane = s.lanes[segment], middle = m.num_layers - 2, last = start + length - 1;
        double* const sums = router.sums + lane * kv_dim;
        features.resize(2 * kv_dim);
        hidden_units.resize(router.rank);
        scores.resize(middle);
        for (int64_t i = 0; i < kv_dim; ++i) {
            for (int64_t row = start; row <= last; ++row) sums[i] += state(row, i);
            features[i] = static_cast<float>(sums[i] / static_cast<double>(s.positions[last] + 1));
            features[kv_dim + i] = state(last, i);
        }
        int8_t* const mask = s.masks + segment * m.num_layers;
        int8_t* const before = router.last_masks + lane * m.num_layers;
        if (!s.reroutes[segment]) {
            std::copy_n(before, m.num_layers, mask);
            return;
        }
        std::copy_n(router.prior, middle, scores.data());
        if (router.down) {
            for (int64_t unit = 0; unit < router.rank; ++unit) {
                float x = router.down_bias[unit];
                const float* const weights = router.down + unit * router.num_features;
                Vec parts = Vec{};
                int64_t i = 0;
                for (; i + LANES <= router.num_features; i += LANES) parts += load(weights + i) * load(&features[i]);
                for (; i < router.num_features; ++i) x += weights[i] * features[i];
                x += sum(parts);
                hidden_units[unit] = x / (1.f + std::exp(-x));
            }
            for (int64_t layer = 0; layer < middle; ++layer) {
                scores[layer] += router.up_bias[layer];
                for (int64_t unit = 0; unit < router.rank; ++unit)
                    scores[layer] += router.up[layer * router.rank + unit] * hidden_units[unit];
            }
        }
        std::fill_n(mask, m.num_layers, int8_t{0});
        mask[0] = mask[m.num_layers - 1] = 1;
        for (int64_t left = s.budgets[segment] - 2; left > 0; --left) {
            int64_t best = -1;  // of equals the lower index
            for (int64_t layer = 0; layer < middle; ++layer)
                if (!mask[layer + 1] && (best < 0 || scores[layer] > scores[best])) best = layer;
            mask[best + 1] = 1;
        }
        std::copy_n(mask, m.num_layers, before);
    }

    const Model m;
    const std::vector<Layer> layers;
    Barrier barrier, gate;  // within a step, and around it
    std::vector<Worker> workers;
    std::vector<std::thread> threads;
    Step* step = nullptr;
    const Router* router = nullptr;
    int64_t kv_dim, width, q_width, kv_width, mlp_width, v_width, scores_width = 0;
    bool one_row_each = false;
    Inputs shared;
    std::vector<float> hidden, q, kv, attended, gated, cos, sin, features, hidden_units, scores;
    std::vector<int64_t> segment_of_row;
    std::vector<int32_t> all_rows, wanted;
    std::vector<Segment> segments;
    std::vector<std::vector<int32_t>> running, place_of_row;  // by layer: rows that run it, and each row's place there
};

}  // namespace

extern "C" {

void* buddy_decoder(const Model* model) { return new Decoder(*model); }
void buddy_free(void* decoder) { delete static_cast<Decoder*>(decoder); }
void buddy_step(void* decoder, Step* step, const Router* router) { static_cast<Decoder*>(decoder)->run(*step, *router); }
}
