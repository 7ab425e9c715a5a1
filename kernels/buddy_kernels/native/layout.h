// Where every field of interface.h stands, for native_interface.py to compare with its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "interface.h"

namespace buddy {

// Each struct's size, then its fields' offsets in order.
#define SIZE(S) static_cast<int64_t>(sizeof(S))
#define AT(S, field) static_cast<int64_t>(offsetof(S, field))
inline const int64_t LAYOUT[] = {
    SIZE(Matrix), AT(Matrix, panels), AT(Matrix, bias), AT(Matrix, scales), AT(Matrix, outputs), AT(Matrix, inputs),
    AT(Matrix, kind),

    SIZE(Layer), AT(Layer, input_norm), AT(Layer, post_norm), AT(Layer, q_norm), AT(Layer, k_norm), AT(Layer, q),
    AT(Layer, kv), AT(Layer, o), AT(Layer, gate_up), AT(Layer, down), AT(Layer, k), AT(Layer, v), AT(Layer, window),
    AT(Layer, writes_all), AT(Layer, exit_norm), AT(Layer, small_gate_up), AT(Layer, small_down),

    SIZE(Model), AT(Model, kind), AT(Model, cache_kind), AT(Model, num_layers), AT(Model, dim), AT(Model, num_heads),
    AT(Model, num_kv_heads), AT(Model, head_dim), AT(Model, mlp_dim), AT(Model, small_mlp_dim), AT(Model, vocab), AT(Model, num_blocks),
    AT(Model, num_threads), AT(Model, eps), AT(Model, scale), AT(Model, attention_factor), AT(Model, inv_freq),
    AT(Model, embeddings), AT(Model, norm), AT(Model, head), AT(Model, layers),

    SIZE(Router), AT(Router, down), AT(Router, down_bias), AT(Router, up), AT(Router, up_bias), AT(Router, prior),
    AT(Router, num_features), AT(Router, rank), AT(Router, num_lanes), AT(Router, num_actions), AT(Router, costs), AT(Router, forced),
    AT(Router, sums), AT(Router, last_paths),

    SIZE(Wanted), AT(Wanted, row), AT(Wanted, given), AT(Wanted, num_likeliest), AT(Wanted, max_tokens),
    AT(Wanted, num_counts), AT(Wanted, num_bias), AT(Wanted, num_end_tokens), AT(Wanted, temperature), AT(Wanted, top_k),
    AT(Wanted, top_p), AT(Wanted, min_p), AT(Wanted, presence_penalty), AT(Wanted, frequency_penalty),
    AT(Wanted, uniforms), AT(Wanted, counted), AT(Wanted, counts), AT(Wanted, bias_tokens), AT(Wanted, bias),
    AT(Wanted, end_tokens), AT(Wanted, allowed),

    SIZE(Step), AT(Step, num_rows), AT(Step, num_ahead), AT(Step, num_segments), AT(Step, num_wanted),
    AT(Step, most_steps), AT(Step, most_likeliest), AT(Step, tokens), AT(Step, positions), AT(Step, lengths),
    AT(Step, aheads), AT(Step, tables), AT(Step, table_starts), AT(Step, lanes), AT(Step, max_costs), AT(Step, aligned),
    AT(Step, path_actions), AT(Step, wanted), AT(Step, paths), AT(Step, logits), AT(Step, next_tokens),
    AT(Step, logprobs), AT(Step, likeliest), AT(Step, likeliest_logprobs), AT(Step, sums), AT(Step, first_v),
    AT(Step, choose), AT(Step, accept), AT(Step, most_s), AT(Step, router_s), AT(Step, num_steps),
};
#undef SIZE
#undef AT

}  // namespace buddy
