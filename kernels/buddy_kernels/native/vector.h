// 16 floats at once, in the compiler's vector types: it makes of them what the processor has.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

namespace buddy {

constexpr int64_t LANES = 16;   // outputs in a panel, and tokens in a block of the cache
constexpr int64_t PAD = 64;     // floats a row is padded to, and inputs that share a scale in int8

inline int64_t padded(int64_t n, int64_t to = PAD) { return (n + to - 1) / to * to; }

typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t VecU __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t VecH __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t VecB __attribute__((vector_size(16), aligned(1), may_alias));

inline Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const uint16_t* p) {
#if defined(__AVX512F__)
    // The compiler makes it of halves.
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#endif
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const VecH*>(p), VecU) << 16);
}
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline void store(uint16_t* p, VecH x) { *reinterpret_cast<VecH*>(p) = x; }
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline VecH to_bf16(Vec x) {
    const VecU bits = (VecU)x;
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, VecH);
}
inline float round_to_bf16(float x) {
    const uint32_t bits = static_cast<uint32_t>(to_bf16(x)) << 16;
    std::memcpy(&x, &bits, 4);
    return x;
}
// `count` floats, a multiple of 16.
inline void add(float* to, const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(to + i) + load(x + i));
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec x) {
    float s[LANES];
    store(s, x);
    for (int64_t width = LANES / 2; width; width /= 2)
        for (int64_t i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
}
inline int32_t sum(VecI x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t s[LANES];
    std::memcpy(s, &x, sizeof s);
    return std::accumulate(s, s + LANES, 0);
#endif
}
inline float largest(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float s[LANES];
    store(s, x);
    return *std::max_element(s, s + LANES);
#endif
}

// Of equals the lowest; 0 where nothing is a number.
inline int64_t index_of_largest(const float* values, int64_t count) {
    float most = -INFINITY;
    int64_t i = 0;
    if (count >= LANES) {
        Vec parts = splat(-INFINITY);
        for (; i + LANES <= count; i += LANES) parts = max(load(values + i), parts);  // what is no number never wins
        most = largest(parts);
    }
    for (; i < count; ++i) most = std::max(most, values[i]);
    const int64_t found = std::find(values, values + count, most) - values;
    return found < count ? found : 0;
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

}  // namespace buddy
