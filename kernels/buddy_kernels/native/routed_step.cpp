// One step of a routed decoder on a CPU: every layer, the router's choice after the first layer's V, and the head.
//
// A row's result does not depend on the rows beside it: every output is summed over its inputs in one fixed order,
// whatever the batch and the number of threads. Weights come packed in panels of 16 outputs (packing.py), so that a
// product is loads, broadcasts and fused multiply-adds. Threads share the outputs of a product and meet between one and
// the next. Without torch's headers: it compiles in seconds.
//
// N rows, M of them run a layer, S segments, D model dim, L layers, Hq query heads, Hkv key/value heads, G = Hq / Hkv,
// Dh head dim, F = Hkv x Dh. Every row of floats is padded with zeros to a multiple of 64.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "attention.h"
#include "barrier.h"
#include "interface.h"
#include "product.h"
#include "vector.h"

namespace buddy {

constexpr int BETWEEN_STEPS = 10000;  // spins, about a millisecond: the next step is seldom further away
constexpr int64_t ALONE = 4;          // up to so many rows every thread prepares its own inputs rather than wait

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

    // Null, or what is wrong with the step; then nothing has run.
    const char* run(Step& new_step, const Router& new_router) {
        if (const char* mistake = check(new_step, new_router)) return mistake;
        prepare(new_step);
        step = &new_step, router = &new_router;
        gate.wait();
        run_thread(*step, *router, 0);
        gate.wait();
        return nullptr;
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

    const char* check(const Step& s, const Router& r) const {
        const auto outside = [](const int64_t* values, int64_t count, int64_t least, int64_t end) {
            return std::any_of(values, values + count, [=](int64_t x) { return x < least || x >= end; });
        };
        if (outside(s.tokens, s.num_rows, 0, m.vocab)) return "a token is not in the vocabulary";
        if (outside(s.positions, s.num_rows, 0, s.table_width * LANES)) return "a position is past its block table";
        if (outside(s.tables, s.num_segments * s.table_width, 0, m.num_blocks)) return "a block is not in the pool";
        if (outside(s.wanted, s.num_wanted, 0, s.num_rows)) return "a wanted row is not in the step";
        if (outside(s.budgets, s.num_segments, 2, m.num_layers + 1)) return "a budget is not 2 to all layers";
        if (!s.choose && outside(s.lanes, s.num_segments, 0, r.num_lanes)) return "a lane is unknown";
        if (outside(s.lengths, s.num_segments, 1, s.num_rows + 1)) return "a segment is empty or too long";
        const int64_t total = std::accumulate(s.lengths, s.lengths + s.num_segments, int64_t{0});
        return total == s.num_rows ? nullptr : "the segments are not all of the rows";
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

    template <class Element>
    void attention(const Step& s, const Layer& layer, int64_t index, int thread) {
        const int64_t heads = m.num_kv_heads, half = m.head_dim / 2, group = m.num_heads / heads;
        const int64_t k_size = m.head_dim * LANES, v_size = v_width * LANES;
        auto* const k = static_cast<Element*>(layer.k);
        auto* const v = static_cast<Element*>(layer.v);
        const auto write = [&](int64_t row, int64_t head) {
            const int64_t position = s.positions[row], slot = position % LANES;
            const int64_t block = s.tables[segment_of_row[row] * s.table_width + position / LANES];
            float rotated[MAX_HEAD_DIM];
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
        std::copy_n(sums, kv_dim, s.sums + segment * kv_dim);
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

}  // namespace buddy

extern "C" {

// Null when there is no memory for it.
void* buddy_decoder(const buddy::Model* model) {
    try {
        return new buddy::Decoder(*model);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void buddy_free(void* decoder) { delete static_cast<buddy::Decoder*>(decoder); }

const char* buddy_step(void* decoder, buddy::Step* step, const buddy::Router* router) {
    try {
        return static_cast<buddy::Decoder*>(decoder)->run(*step, *router);
    } catch (const std::exception&) {
        return "there is not enough memory";
    }
}
}
