// One step of a routed decoder on a CPU: every layer, the router's choice after the first layer's V, and the head.
//
// A row's result does not depend on the rows beside it: every output is summed over its inputs in one fixed order,
// whatever the batch and the number of threads. Weights come packed in panels of 16 outputs (packing.py), so that a
// product is loads, broadcasts and fused multiply-adds. Threads share the outputs of a product and meet between one and
// the next. Without torch's headers: it compiles in seconds.
//
// N rows, M of them run a layer, S segments, D model dim, L layers, Hq query heads, Hkv key/value heads, G = Hq / Hkv,
// Dh head dim, F = Hkv x Dh. Every row of floats is padded with zeros to a multiple of 64.

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "attention.h"
#include "barrier.h"
#include "inputs.h"
#include "interface.h"
#include "layout.h"
#include "multi_step.h"
#include "product.h"
#include "router.h"
#include "sampling.h"
#include "vector.h"

namespace buddy {

constexpr int BETWEEN_STEPS = 10000;  // spins, 0.15 ms on a 2.3 GHz Xeon: what Python takes until the next step
constexpr int64_t ALONE = 4;          // up to so many rows every thread prepares its own inputs rather than wait

class Decoder {
  public:
    explicit Decoder(const Model& model)
        : m(model), layers(model.layers, model.layers + model.num_layers), barrier(m.num_threads), gate(m.num_threads),
          workers(m.num_threads), chooser(m.num_layers, m.num_kv_heads * m.head_dim) {
        kv_dim = m.num_kv_heads * m.head_dim;
        width = padded(m.dim);
        q_width = padded(m.num_heads * m.head_dim);
        kv_width = padded(2 * kv_dim);
        mlp_width = padded(m.mlp_dim), small_mlp_width = padded(m.small_mlp_dim);
        v_width = padded(m.head_dim, LANES);
        rows_together = std::max<int64_t>(1, MOST_QUERIES * m.num_kv_heads / m.num_heads);
        for (int thread = 1; thread < m.num_threads; ++thread) threads.emplace_back([this, thread] { serve(thread); });
    }

    ~Decoder() {
        step = nullptr;
        gate.wait();
        for (std::thread& thread : threads) thread.join();
    }

    Decoder(const Decoder&) = delete;

    // False when this processor has no arithmetic of that name for these weights.
    bool use(const char* name) {
        const Arithmetic* const found = find_arithmetic(m.kind, name);
        if (found) arithmetic = found;
        return found;
    }

    // Null, or what is wrong with the step; then nothing has run.
    const char* run(Step& given, const Router& given_router) {
        if (const char* mistake = check(given, given_router)) return mistake;
        const auto started = std::chrono::steady_clock::now();
        router = &given_router;
        MultiStep steps(given, m.vocab, m.num_layers, kv_dim);
        counts.assign(given.num_wanted, {});
        for (int64_t i = 0; i < given.num_wanted; ++i) {
            const Wanted& wanted = given.wanted[i];
            if (wanted.presence_penalty == 0 && wanted.frequency_penalty == 0) continue;
            for (int64_t j = 0; j < wanted.num_counts; ++j) counts[i].push_back({wanted.counted[j], wanted.counts[j]});
        }
        for (;;) {
            prepare(steps.now);
            step = &steps;
            gate.wait();
            run_thread(steps, *router, 0);
            gate.wait();
            if (given.accept) given.accept();
            const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - started;
            if (!steps.go_on() || passed.count() >= given.most_s) return nullptr;
        }
    }

    // The caller and the other threads, each to a processor of its own. Whatever else wakes up would otherwise have them
    // moved about, now and then onto the same one, where one spins for what the other has no turn to do.
    void pin() {
#if defined(__linux__)
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) != m.num_threads) return;
        int64_t thread = 0;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            cpu_set_t own;
            CPU_ZERO(&own);
            CPU_SET(cpu, &own);
            pthread_setaffinity_np(thread ? threads[thread - 1].native_handle() : pthread_self(), sizeof own, &own);
            ++thread;
        }
#endif
    }

  private:
    struct alignas(64) Worker {
        Inputs inputs;
        std::vector<float> normed, q, scores;
        Sampler sampler;
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
        if (outside(s.tokens, s.num_rows + s.num_ahead, 0, m.vocab)) return "a token is not in the vocabulary";
        if (outside(s.tables, s.table_starts[s.num_segments], 0, m.num_blocks)) return "a block is not in the pool";
        if (!s.choose && outside(s.lanes, s.num_segments, 0, r.num_lanes)) return "a lane is unknown";
        if (!s.choose && outside(s.max_costs, s.num_segments, chooser.smallest_cost(r), INT64_MAX))
            return "a segment may cost less than the layers that always run";
        if (outside(s.lengths, s.num_segments, 1, s.num_rows + 1)) return "a segment is empty or too long";
        if (outside(s.aheads, s.num_segments, 0, s.num_ahead + 1)) return "a segment looks too far ahead";
        for (int64_t i = 0; i < s.num_wanted; ++i)
            if (const char* mistake = check(s.wanted[i], s.num_rows)) return mistake;
        if (s.most_steps > 1) {
            bool alone = !s.choose && s.num_wanted == s.num_rows && s.num_segments == s.num_rows && !s.num_ahead;
            for (int64_t i = 0; i < s.num_wanted && alone; ++i) alone = s.wanted[i].row == i && s.path_actions[i] != CONTINUE;
            if (!alone) return "rows go on by themselves where each is a segment and wanted, and no callable chooses";
        }
        int64_t row = 0;
        for (int64_t i = 0; i < s.num_segments; row += s.lengths[i++]) {
            const int64_t leader = s.aligned[i];
            if (leader < 0 || leader > i || s.aligned[leader] != leader || s.max_costs[leader] != s.max_costs[i])
                return "a segment is aligned with one that is later, aligned itself, or of another cost";
            if (leader != i && (s.path_actions[i] != CHOOSE || s.path_actions[leader] != CHOOSE))
                return "a segment that chooses no path is aligned";
            if (row + s.lengths[i] > s.num_rows) break;
            const int64_t end = (s.table_starts[i + 1] - s.table_starts[i]) * LANES;
            const int64_t more = s.most_steps > 1 ? s.wanted[i].max_tokens - 1 : 0;
            if (outside(s.positions + row, s.lengths[i], 0, end - more)) return "a position is past its block table";
        }
        if (std::accumulate(s.lengths, s.lengths + s.num_segments, int64_t{0}) != s.num_rows)
            return "the segments are not all of the rows";
        if (std::accumulate(s.aheads, s.aheads + s.num_segments, int64_t{0}) != s.num_ahead)
            return "the segments do not look ahead at all of the tokens";
        return nullptr;
    }

    const char* check(const Wanted& w, int64_t num_rows) const {
        if (w.max_tokens < 1) return "a wanted row makes no token";
        const auto unknown = [&](const int64_t* tokens, int64_t count) {
            return std::any_of(tokens, tokens + count, [&](int64_t token) { return token < 0 || token >= m.vocab; });
        };
        if (w.row < 0 || w.row >= num_rows) return "a wanted row is not in the step";
        if (w.given < -1 || w.given >= m.vocab || unknown(w.counted, w.num_counts) || unknown(w.bias_tokens, w.num_bias))
            return "a token of a wanted row is not in the vocabulary";
        if (w.num_likeliest > m.vocab) return "more of the likeliest tokens are asked for than there are";
        return allows_any(w, m.vocab) ? nullptr : "a wanted row allows no token";
    }

    void prepare(const Step& s) {
        const int64_t n = s.num_rows + s.num_ahead;
        const auto grow = [](auto& buffer, int64_t size) {
            if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size, 0);
        };
        grow(hidden, n * width);
        grow(q, n * q_width);
        grow(kv, n * kv_width);
        grow(attended, n * q_width);
        grow(gated, n * mlp_width);
        grow(small_gated, n * small_mlp_width);
        grow(cos, n * m.head_dim / 2);
        grow(sin, n * m.head_dim / 2);
        segment_of_row.resize(n);
        all_rows.resize(n);
        for (int64_t row = 0; row < n; ++row) all_rows[row] = static_cast<int32_t>(row);
        segments.clear();
        int64_t start = 0, ahead = s.num_rows, longest = 0;
        for (int64_t i = 0; i < s.num_segments; ahead += s.aheads[i++]) {
            segments.push_back({start, s.lengths[i], ahead, s.aheads[i], s.tables + s.table_starts[i]});
            for (int64_t row = start; row < start + s.lengths[i]; ++row)
                segment_of_row[row] = i, longest = std::max(longest, s.positions[row] + 1);
            start += s.lengths[i];
        }
        // A row sees rows of its own step when its sequence has several.
        one_row_each = s.num_rows == s.num_segments;
        for (int64_t i = 1; i < s.num_segments && one_row_each; ++i)
            for (int64_t j = 0; j < i && one_row_each; ++j) one_row_each = s.lanes[i] != s.lanes[j];
        for (Worker& worker : workers) {
            grow(worker.normed, std::max({width, q_width, mlp_width}));
            grow(worker.q, MOST_QUERIES * m.head_dim);
            grow(worker.scores, MOST_QUERIES * padded(longest + LANES));
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
        return normed_inputs(x, x_width, dim, rows, count, [norm](int32_t) { return norm; }, thread);
    }

    // The same, each row by its own norm.
    template <class NormOf>
    const Inputs& normed_inputs(
        const float* x, int64_t x_width, int64_t dim, const int32_t* rows, int64_t count, const NormOf& norm_of, int thread
    ) {
        const bool alone = count <= ALONE;
        Inputs& into = alone ? workers[thread].inputs : shared;
        if (alone) {
            into.shape(count, x_width, arithmetic->inputs);
        } else {
            if (thread == 0) into.shape(count, x_width, arithmetic->inputs);
            barrier.wait();
        }
        const auto [first, last] = alone ? std::pair<int64_t, int64_t>{0, count} : share(count, thread);
        float* const normed = workers[thread].normed.data();
        for (int64_t i = first; i < last; ++i) {
            const float* const row = x + rows[i] * x_width;
            const float* const norm = norm_of(rows[i]);
            if (norm) rms_norm(row, norm, dim, x_width, m.eps, normed);
            into.set(i, norm ? normed : row);
        }
        if (!alone) barrier.wait();
        return into;
    }

    // Of inputs rows[0 .. count - 1].
    template <class Store>
    void product(
        const Matrix& w, const Inputs& x, const int32_t* rows, int64_t count, int thread, const Store& result
    ) {
        const auto [first, last] = share(w.outputs / LANES / SIDE_BY_SIDE, thread);
        multiply(arithmetic->sum_tile, w, first * SIDE_BY_SIDE, last * SIDE_BY_SIDE, x, rows, count, result);
    }

    void run_thread(MultiStep& steps, const Router& router, int thread) {
        Step& s = steps.now;
        embed(s, thread);
        barrier.wait();
        for (int64_t index = 0; index < m.num_layers; ++index) {
            const Layer& layer = layers[index];
            const bool all = layer.writes_all;
            if (!all && running[index].empty()) continue;
            const int64_t n = all ? s.num_rows + (index == 0 ? s.num_ahead : 0) : static_cast<int64_t>(running[index].size());
            const int32_t* const written = all ? all_rows.data() : running[index].data();
            const Inputs& normed = inputs(hidden.data(), width, m.dim, written, n, layer.input_norm, thread);
            product(layer.kv, normed, all_rows.data(), n, thread, Write{kv.data(), kv_width});
            if (index == 0) {
                barrier.wait();
                if (thread == 0) choose(s, router);
                barrier.wait();
            }
            const std::vector<int32_t>& rows = running[index];
            const auto count = static_cast<int64_t>(rows.size());
            product(layer.q, normed, all ? rows.data() : all_rows.data(), count, thread, Write{q.data(), q_width});
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
                layer.o, inputs(attended.data(), q_width, 0, all_rows.data(), count, nullptr, thread), all_rows.data(), count,
                thread, AddToHidden{hidden.data(), width, rows.data()}
            );
            barrier.wait();
            feed_forward(fed[index][RUN], layer.post_norm, layer.gate_up, layer.down, gated.data(), mlp_width, thread);
            feed_forward(
                fed[index][SMALL], layer.post_norm, layer.small_gate_up, layer.small_down, small_gated.data(),
                small_mlp_width, thread
            );
        }
        if (s.num_wanted == 0) return;
        const Inputs& last = normed_inputs(
            hidden.data(), width, m.dim, wanted.data(), s.num_wanted, [this](int32_t row) { return last_norms[row]; }, thread
        );
        product(m.head, last, all_rows.data(), s.num_wanted, thread, WriteLogits{s.logits, m.vocab});
        barrier.wait();
        const auto [first, end] = share(s.num_wanted, thread);
        for (int64_t i = first; i < end; ++i) take_token(steps, i, workers[thread].sampler);
    }

    // Adds the FFN's output to the hidden states of `rows`. `between` is its own: what pads its rows stays zero.
    void feed_forward(
        const std::vector<int32_t>& rows, const float* norm, const Matrix& gate_up, const Matrix& down, float* between,
        int64_t inner, int thread
    ) {
        const auto count = static_cast<int64_t>(rows.size());
        if (count == 0) return;
        product(
            gate_up, inputs(hidden.data(), width, m.dim, rows.data(), count, norm, thread), all_rows.data(), count, thread,
            WriteGated{between, inner}
        );
        barrier.wait();
        product(
            down, inputs(between, inner, 0, all_rows.data(), count, nullptr, thread), all_rows.data(), count, thread,
            AddToHidden{hidden.data(), width, rows.data()}
        );
        barrier.wait();
    }

    // The next token of the wanted row `index`, and its log probability.
    void take_token(MultiStep& steps, int64_t index, Sampler& sampler) {
        const Wanted& wanted = steps.now.wanted[index];
        const float* const row = steps.now.logits + index * m.vocab;
        Counts& counted = counts[steps.place(index)];
        const double uniform = wanted.uniforms ? *wanted.uniforms : 0.;
        const int64_t token = wanted.given >= 0 ? wanted.given : sampler.draw(row, m.vocab, wanted, counted, uniform);
        if (wanted.presence_penalty != 0 || wanted.frequency_penalty != 0) {
            const auto known = std::find_if(counted.begin(), counted.end(), [&](const auto& c) { return c.first == token; });
            if (known == counted.end()) counted.push_back({token, 1});
            else ++known->second;
        }
        const MultiStep::Output out = steps.output(index);
        *out.token = token;
        if (wanted.num_likeliest >= 0)
            *out.logprob = sampler.score(row, m.vocab, token, wanted.num_likeliest, out.likeliest, out.likeliest_logprobs);
    }

    void embed(const Step& s, int thread) {
        const auto [first, last] = share(s.num_rows + s.num_ahead, thread);
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
            for (int64_t i = 0; i < half && row < s.num_rows; ++i) {
                const double angle = static_cast<float>(s.positions[row]) * m.inv_freq[i];
                cos[row * half + i] = static_cast<float>(std::cos(angle) * m.attention_factor);
                sin[row * half + i] = static_cast<float>(std::sin(angle) * m.attention_factor);
            }
        }
        if (thread == 0) {
            wanted.clear();
            for (int64_t i = 0; i < s.num_wanted; ++i) wanted.push_back(static_cast<int32_t>(s.wanted[i].row));
        }
    }

    template <class Element>
    void attention(const Step& s, const Layer& layer, int64_t index, int thread) {
        const int64_t heads = m.num_kv_heads, half = m.head_dim / 2;
        const int64_t k_size = m.head_dim * LANES, v_size = v_width * LANES;
        const std::vector<int32_t>& place = place_of_row[index];
        const auto write = [&](int64_t row, int64_t head) {
            const int64_t at = layer.writes_all ? row : place[row];
            if (at < 0) return;
            const int64_t position = s.positions[row], slot = position % LANES;
            const int64_t block = segments[segment_of_row[row]].table[position / LANES];
            float rotated[MAX_HEAD_DIM];
            const float* const states = &kv[at * kv_width + head * m.head_dim];
            normed_and_rotated(states, layer.k_norm, m.head_dim, m.eps, &cos[row * half], &sin[row * half], rotated);
            // Panels of keys, and of values: in bf16 with pairs of inputs side by side.
            constexpr int64_t PAIR = sizeof(Element) == 2 ? 2 : 1;
            Element* const key = static_cast<Element*>(layer.k) + (block * heads + head) * k_size + slot * PAIR;
            Element* const value = static_cast<Element*>(layer.v) + (block * heads + head) * v_size +
                                   slot / PAIR * PAIR * LANES + slot % PAIR;
            for (int64_t d = 0; d < m.head_dim; ++d) {
                put(key + d / PAIR * PAIR * LANES + d % PAIR, rotated[d]);
                put(value + d / LANES * LANES * LANES + d % LANES * PAIR, states[kv_dim + d]);
            }
        };
        if (one_row_each) {
            // Nobody else looks at what this thread's head of this row has written.
            const int64_t items = s.num_rows * heads;
            for (int64_t item = thread; item < items; item += m.num_threads) {
                const int64_t row = item / heads, head = item % heads;
                write(row, head);
                if (place[row] >= 0) attend_rows<Element>(s, layer, segments[row], row, 1, place[row], head, thread);
            }
            return;
        }
        const auto [first, last] = share(s.num_rows * heads, thread);
        for (int64_t item = first; item < last; ++item) write(item / heads, item % heads);
        barrier.wait();
        // Heads first, so that a thread's next rows find the keys in its cache; in turns, so that shares are even.
        int64_t item = 0;
        for (int64_t head = 0; head < heads; ++head) {
            for (const Segment& segment : segments) {
                if (place[segment.start] < 0) continue;
                for (int64_t at = 0; at < segment.length; at += rows_together, ++item) {
                    if (item % m.num_threads != thread) continue;
                    const int64_t row = segment.start + at, count = std::min(rows_together, segment.length - at);
                    attend_rows<Element>(s, layer, segment, row, count, place[row], head, thread);
                }
            }
        }
    }

    // Rows row .. row + count - 1 of a segment, all heads of a key/value head.
    template <class Element>
    void attend_rows(
        const Step& s, const Layer& layer, const Segment& segment, int64_t row, int64_t count, int64_t place, int64_t head,
        int thread
    ) {
        const int64_t half = m.head_dim / 2, heads = m.num_kv_heads, group = m.num_heads / heads;
        const int64_t k_size = m.head_dim * LANES, v_size = v_width * LANES;
        const KeysAndValues seen = {
            static_cast<const Element*>(layer.k) + head * k_size, static_cast<const Element*>(layer.v) + head * v_size,
            segment.table, m.head_dim, heads * k_size, heads * v_size, static_cast<float>(m.scale)
        };
        Worker& worker = workers[thread];
        Query queries[MOST_QUERIES];
        int64_t held = 0;
        for (int64_t i = 0; i < count * group; ++i) {
            const int64_t of_row = row + i / group, start = (head * group + i % group) * m.head_dim;
            const int64_t last = s.positions[of_row];
            normed_and_rotated(
                &q[(place + i / group) * q_width + start], layer.q_norm, m.head_dim, m.eps, &cos[of_row * half],
                &sin[of_row * half], &worker.q[held * m.head_dim]
            );
            queries[held++] = {
                layer.window ? std::max<int64_t>(0, last - layer.window + 1) : 0, last,
                &attended[(place + i / group) * q_width + start]
            };
            if (held < MOST_QUERIES && i + 1 < count * group) continue;
            arithmetic->attend(seen, queries, held, worker.q.data(), worker.scores.data(), scores_width);
            held = 0;
        }
    }

    void choose(Step& s, const Router& router) {
        const auto started = std::chrono::steady_clock::now();
        if (s.choose) {
            for (int64_t row = 0; row < s.num_rows + s.num_ahead; ++row)
                for (int64_t i = 0; i < kv_dim; ++i) s.first_v[row * kv_dim + i] = state(row, i);
            s.choose();
        } else {
            chooser.choose(s, router, segments, [this](int64_t row, int64_t i) { return state(row, i); });
        }
        running.resize(m.num_layers);
        place_of_row.resize(m.num_layers);
        fed.resize(m.num_layers);
        last_norms.assign(s.num_rows, m.norm);
        for (int64_t layer = 0; layer < m.num_layers; ++layer) {
            running[layer].clear();
            for (std::vector<int32_t>& rows : fed[layer]) rows.clear();
            place_of_row[layer].assign(s.num_rows, -1);
            for (int64_t i = 0; i < s.num_segments; ++i) {
                const int8_t action = s.paths[i * m.num_layers + layer];
                if (action == SKIP) continue;
                for (int64_t row = segments[i].start; row < segments[i].start + segments[i].length; ++row) {
                    place_of_row[layer][row] = static_cast<int32_t>(running[layer].size());
                    running[layer].push_back(static_cast<int32_t>(row));
                    fed[layer][action].push_back(static_cast<int32_t>(row));
                    if (layers[layer].exit_norm) last_norms[row] = layers[layer].exit_norm;
                }
            }
        }
        s.router_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    }

    // The first layer's V as the cache has it.
    float state(int64_t row, int64_t i) const {
        const float x = kv[row * kv_width + kv_dim + i];
        return m.cache_kind == BF16 ? round_to_bf16(x) : x;
    }

    const Model m;
    const std::vector<Layer> layers;
    Barrier barrier, gate;  // within a step, and around it
    std::vector<Worker> workers;
    PathChooser chooser;
    std::vector<Counts> counts;  // [wanted]: of rows with penalties
    std::vector<std::thread> threads;
    MultiStep* step = nullptr;
    const Router* router = nullptr;
    int64_t kv_dim, width, q_width, kv_width, mlp_width, small_mlp_width, v_width, rows_together, scores_width = 0;
    bool one_row_each = false;
    const Arithmetic* arithmetic = nullptr;
    Inputs shared;
    std::vector<float> hidden, q, kv, attended, gated, small_gated, cos, sin;
    std::vector<int64_t> segment_of_row;
    std::vector<int32_t> all_rows, wanted;
    std::vector<Segment> segments;
    std::vector<const float*> last_norms;                     // by row, before the head
    std::vector<std::vector<int32_t>> running, place_of_row;  // by layer: rows that run it, and each row's place there
    std::vector<std::array<std::vector<int32_t>, 3>> fed;     // by layer and action: the rows among them
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

// Sizes and offsets of the structs of interface.h, `count` numbers.
const int64_t* buddy_layout(int64_t* count) {
    *count = std::size(buddy::LAYOUT);
    return buddy::LAYOUT;
}

// False when this processor has no arithmetic of that name for the decoder's kind of weights.
bool buddy_use(void* decoder, const char* arithmetic) { return static_cast<buddy::Decoder*>(decoder)->use(arithmetic); }

// Rows x times a matrix into out, rows padded on both sides. False when this processor has no such arithmetic.
bool buddy_product(const buddy::Matrix* m, const char* arithmetic, const float* x, int64_t num_rows, float* out) {
    try {
        const buddy::Arithmetic* const how = buddy::find_arithmetic(m->kind, arithmetic);
        if (!how) return false;
        buddy::Inputs inputs;
        inputs.shape(num_rows, m->inputs, how->inputs);
        for (int64_t row = 0; row < num_rows; ++row) inputs.set(row, x + row * m->inputs);
        std::vector<int32_t> rows(num_rows);
        std::iota(rows.begin(), rows.end(), 0);
        buddy::multiply(how->sum_tile, *m, 0, m->outputs / buddy::LANES, inputs, rows.data(), num_rows, buddy::Write{out, m->outputs});
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

// The name of the index-th arithmetic for a kind of weights that this processor has; null behind the last.
const char* buddy_arithmetic(int64_t weights, int64_t index) {
    for (const buddy::Arithmetic& known : buddy::ARITHMETICS)
        if (known.weights == weights && index-- == 0) return known.name;
    return nullptr;
}

void buddy_pin(void* decoder) { static_cast<buddy::Decoder*>(decoder)->pin(); }

void buddy_free(void* decoder) { delete static_cast<buddy::Decoder*>(decoder); }

const char* buddy_step(void* decoder, buddy::Step* step, const buddy::Router* router) {
    try {
        return static_cast<buddy::Decoder*>(decoder)->run(*step, *router);
    } catch (const std::exception&) {
        return "there is not enough memory";
    }
}
}
