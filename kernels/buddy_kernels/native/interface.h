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
    int64_t writes_all;                                     // whether rows that skip the layer write K/V too
    const float* exit_norm;                                 // of its rows, before the head; null: the model's
    Matrix small_gate_up, small_down;                       // of the small FFN, as those of the big one; or no outputs
};

struct Model {
    int64_t kind, cache_kind, num_layers, dim, num_heads, num_kv_heads, head_dim, mlp_dim, small_mlp_dim, vocab, num_blocks, num_threads;
    double eps, scale, attention_factor;
    const float* inv_freq;
    const void* embeddings;  // fp32 or bf16 as cache_kind
    const float* norm;
    Matrix head;
    const Layer* layers;
};

// How paths are chosen. `choose` null: by scores = prior + up(silu(down(features))), without `down` by the prior alone.
// Scores are of the free layers, those that are not forced, in order: of running one and, if there are three actions, of
// running it with its small FFN.
struct Router {
    const float *down, *down_bias, *up, *up_bias, *prior;
    int64_t num_features, rank, num_lanes, num_actions;
    const int64_t* costs;    // [L, num_actions] milli-layers of each layer's actions
    const uint8_t* forced;   // [L]: whether a layer runs in every path
    double* sums;            // [lanes, F] running sums of V
    int8_t* last_paths;      // [lanes, L]
};

// step.py has what these mean.
enum Action : int8_t { SKIP = 0, RUN = 1, SMALL = 2 };
enum PathAction : uint8_t { KEEP = 0, CHOOSE = 1, CONTINUE = 2 };

struct Wanted {
    int64_t row, given, num_likeliest, max_tokens;  // given: -1 draws; num_likeliest: -1 asks for no log probabilities
    int64_t num_counts, num_bias, num_end_tokens;
    double temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty;
    const double* uniforms;        // [max_tokens]; null: 0
    const int64_t *counted, *counts;  // [num_counts]: tokens of the answer so far, and how often each
    const int64_t* bias_tokens;    // [num_bias]
    const double* bias;
    const int64_t* end_tokens;
    const uint8_t* allowed;        // a bit for each token, which `accept` changes; null: all
};

// One call: a step, or several where every row is a segment and wanted.
struct Step {
    int64_t num_rows, num_ahead, num_segments, num_wanted, most_steps, most_likeliest;
    const int64_t* tokens;  // [N], then [A]: the rest of route blocks of which the step runs the beginning
    const int64_t *positions, *lengths, *aheads;
    const int64_t *tables, *table_starts;  // block tables end to end, and where in them each segment's starts [S + 1]
    const int64_t *lanes, *max_costs;
    const int64_t* aligned;  // [S]: the earlier segment, of the same cost, whose path each shares; its own index: none
    const uint8_t* path_actions;
    const Wanted* wanted;
    int8_t* paths;                // [steps, S, L], written where a segment takes part
    float* logits;                // [wanted, V], written: of the last step, of the rows that took part
    int64_t* next_tokens;         // [steps, wanted], written where a row takes part
    double* logprobs;             // [steps, wanted], the same where asked for
    int64_t* likeliest;           // [steps, wanted, most_likeliest]
    double* likeliest_logprobs;   // [steps, wanted, most_likeliest]
    double* sums;                 // [S, F], written unless `choose`: the running sums of V after each segment
    float* first_v;               // [N + A, F], written for `choose`
    void (*choose)();             // writes the paths; null: the router does
    void (*accept)();             // after every step: its tokens are in next_tokens; null: nobody asks for them
    double most_s;
    double router_s;              // added to
    int64_t num_steps;            // written
};

}  // extern "C"

}  // namespace buddy
