// What Python hands over, field by field as in native_interface.py. Every pointer is a tensor's, which Python keeps alive.
#pragma once

#include <cstdint>

namespace buddy {

constexpr int64_t MAX_HEAD_DIM = 1024;

enum Kind : int64_t { FP32 = 0, BF16 = 1, INT8 = 2 };

extern "C" {

// [outputs, inputs], padded to multiples of 32 and 64, in panels of 16 outputs, two of them side by side. fp32:
// [outputs / 32][input][32]. bf16: [outputs / 32][input / 2][32][2]. int8: [outputs / 32][input / 4][32][4], stored as
// value + 128, and scales [outputs / 32][input / 64][32].
struct Matrix {
    const char* panels;
    const float* bias;    // [outputs], padded; or null
    const float* scales;  // int8 only
    int64_t outputs, inputs, kind;
};

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two null without norms of heads
    Matrix q, kv, o, gate_up, down;                         // kv: K's outputs, then V's; gate_up: panels in turn
    void *k, *v;                                            // cache: [block][Hkv], each a panel of 16 keys; Dh / 16 of 16 tokens
    int64_t window;                                         // 0: all
};

struct Model {
    int64_t kind, cache_kind, num_layers, dim, num_heads, num_kv_heads, head_dim, mlp_dim, vocab, num_blocks, num_threads;
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
    int64_t num_features, rank, num_lanes;
    double* sums;        // [lanes, F] running sums of V
    int8_t* last_masks;  // [lanes, L]
};

// What chooses a segment's path. CONTINUE: it goes on with a prefill block whose path and features are settled.
enum Choice : uint8_t { KEEP = 0, CHOOSE = 1, CONTINUE = 2 };

// How a token is drawn, as in sampling.py: temperature 0 takes the likeliest, top_k 0 keeps all.
struct Sampling {
    double temperature, top_k, top_p, min_p;
};

// With `most_steps` over 1 every row is a segment and wanted, and goes on by its next token: until one of those is an end
// token, or `most_s` seconds are over.
struct Step {
    int64_t num_rows, num_ahead, num_segments, num_wanted, most_steps, num_end_tokens;
    const int64_t* tokens;  // [N], then [A]: the rest of prefill blocks of which the step runs the beginning
    const int64_t *positions, *lengths, *aheads;
    const int64_t *tables, *table_starts;  // block tables end to end, and where in them each segment's starts [S + 1]
    const int64_t *lanes, *budgets, *wanted;
    const int64_t* aligned;  // [S]: the earlier segment, of the same budget, whose path each shares; its own index: none
    const int64_t* end_tokens;
    const uint8_t* choices;
    const Sampling* samplings;  // [wanted]; null: all take the likeliest
    const double* uniforms;     // [wanted, most_steps]
    int8_t* masks;         // [steps, S, L], written
    float* logits;         // [wanted, V], written: of the last step
    int64_t* next_tokens;  // [steps, wanted], written
    double* sums;          // [S, F], written unless `choose`: the running sums of V after each segment
    float* first_v;        // [N + A, F], written for `choose`
    void (*choose)();      // writes the masks; null: the router does
    double most_s;
    double router_s;       // added to
    int64_t num_steps;     // written
};

}  // extern "C"

}  // namespace buddy
