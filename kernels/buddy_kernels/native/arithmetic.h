// What a step's products and its attention are computed with. An engine keeps to one, for prefill and decode together.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "interface.h"
#include "micro_kernels.h"
#include "product.h"

namespace buddy {

struct Arithmetic {
    const char* name;
    int64_t weights, inputs;  // kinds
    SumTile* sum_tile;
    Attend* attend;  // over a cache of fp32 for fp32 weights, else of bf16
};

// Of those for a kind of weights the first is what others have to beat.
inline const Arithmetic ARITHMETICS[] = {
    {"fma", FP32, FP32, sum_tile<FmaFp32>, attend<FmaFp32>},
    {"fma", BF16, FP32, sum_tile<FmaBf16>, attend<FmaBf16>},
#if defined(__AVX512BF16__)
    {"dpbf16", BF16, BF16, sum_tile<DotBf16>, attend<DotBf16>},
#endif
    {DOT_INT8, INT8, INT8, sum_tile<DotInt8>, attend<FmaBf16>},
#if defined(__AVX512BF16__)
    {"dpbusd+dpbf16", INT8, INT8, sum_tile<DotInt8>, attend<DotBf16>},
#endif
};

// Null when there is none of that name.
inline const Arithmetic* find_arithmetic(int64_t weights, const char* name) {
    for (const Arithmetic& known : ARITHMETICS)
        if (known.weights == weights && !std::strcmp(known.name, name)) return &known;
    return nullptr;
}

}  // namespace buddy
