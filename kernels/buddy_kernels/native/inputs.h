// Rows as products read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "interface.h"
#include "vector.h"

namespace buddy {

// fp32, bf16, or int8 with a scale and a sum for every 64.
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
        if (kind == INT8)
            grow(int8, rows * width), grow(scales, rows * width / PAD), grow(sums, rows * width / PAD);
        else if (kind == BF16)
            grow(bf16, rows * width);
        else
            grow(fp32, rows * width);
    }

    void set(int64_t row, const float* x) {
        if (kind == INT8)
            for (int64_t i = 0; i < width; i += PAD) set_group((row * width + i) / PAD, x + i);
        else if (kind == BF16)
            for (int64_t i = 0; i < width; i += LANES) store(&bf16[row * width + i], to_bf16(load(x + i)));
        else
            std::copy_n(x, width, &fp32[row * width]);
    }

    // As floats or as bf16, whichever they are kept as.
    template <class Input>
    const Input* row(int64_t index) const {
        if constexpr (std::is_same_v<Input, float>)
            return &fp32[index * width];
        else
            return &bf16[index * width];
    }

  private:
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
        sums[group] = sum(total);
        scales[group] = scale;
    }
};

}  // namespace buddy
