// Which actions each segment's layers take: features of the first layer's V, the Decision Module's scores, the best that
// the budget pays for. planner.py and selection.py are the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "interface.h"
#include "vector.h"

namespace buddy {

// Consecutive rows of one sequence that share a path, and the tokens ahead that the path follows from.
struct Segment {
    int64_t start, length, ahead_start, ahead_length;
    const int64_t* table;
};

class PathChooser {
  public:
    PathChooser(int64_t num_layers, int64_t num_features) : num_layers(num_layers), width(num_features) {}

    // The cheapest path: what every token costs.
    int64_t smallest_cost(const Router& router) const {
        int64_t cost = 0;
        for (int64_t layer = 0; layer < num_layers; ++layer)
            cost += cost_of(router, layer, router.forced[layer] ? RUN : SKIP);
        return cost;
    }

    // Writes each segment's path. `state(row, i)` is the first layer's V as the cache has it.
    template <class State>
    void choose(Step& s, const Router& router, const std::vector<Segment>& segments, const State& state) {
        free.clear();
        for (int64_t layer = 0; layer < num_layers; ++layer)
            if (!router.forced[layer]) free.push_back(layer);
        num_scores = static_cast<int64_t>(free.size()) * (router.num_actions - 1);
        scores.assign(segments.size() * num_scores, 0.f);
        for (size_t i = 0; i < segments.size(); ++i) score(s, router, segments[i], static_cast<int64_t>(i), state);
        for (size_t i = 0; i < segments.size(); ++i) select(s, router, static_cast<int64_t>(i));
    }

  private:
    // Counts a segment's features and adds its scores to those of the segment it is aligned with, mostly itself.
    template <class State>
    void score(const Step& s, const Router& router, const Segment& segment, int64_t index, const State& state) {
        const auto [start, length, ahead_start, ahead_length, table] = segment;
        const int64_t last = ahead_length ? ahead_start + ahead_length - 1 : start + length - 1;
        const int64_t num_tokens = s.positions[start + length - 1] + 1 + ahead_length;
        double* const sums = router.sums + s.lanes[index] * width;
        if (s.path_actions[index] != CONTINUE) {
            for (int64_t i = 0; i < width; ++i) {
                for (int64_t row = start; row < start + length; ++row) sums[i] += state(row, i);
                for (int64_t row = ahead_start; row < ahead_start + ahead_length; ++row) sums[i] += state(row, i);
            }
        }
        std::copy_n(sums, width, s.sums + index * width);
        if (s.path_actions[index] != CHOOSE) return;
        float* const into = &scores[s.aligned[index] * num_scores];
        for (int64_t i = 0; i < num_scores; ++i) into[i] += router.prior[i];
        if (!router.down) return;
        features.resize(2 * width);
        for (int64_t i = 0; i < width; ++i) {
            features[i] = static_cast<float>(sums[i] / static_cast<double>(num_tokens));
            features[width + i] = state(last, i);
        }
        hidden.resize(router.rank);
        for (int64_t unit = 0; unit < router.rank; ++unit) {
            float x = router.down_bias[unit];
            const float* const weights = router.down + unit * router.num_features;
            Vec parts = Vec{};
            int64_t i = 0;
            for (; i + LANES <= router.num_features; i += LANES) parts += load(weights + i) * load(&features[i]);
            for (; i < router.num_features; ++i) x += weights[i] * features[i];
            x += sum(parts);
            hidden[unit] = x / (1.f + std::exp(-x));
        }
        for (int64_t i = 0; i < num_scores; ++i) {
            float x = router.up_bias[i];
            for (int64_t unit = 0; unit < router.rank; ++unit) x += router.up[i * router.rank + unit] * hidden[unit];
            into[i] += x;
        }
    }

    void select(Step& s, const Router& router, int64_t index) {
        int8_t* const path = s.paths + index * num_layers;
        int8_t* const last_path = router.last_paths + s.lanes[index] * num_layers;
        if (s.path_actions[index] != CHOOSE) {
            std::copy_n(last_path, num_layers, path);
            return;
        }
        const float* const scored = &scores[index * num_scores];
        for (int64_t layer = 0; layer < num_layers; ++layer) path[layer] = static_cast<int8_t>(router.forced[layer] ? RUN : SKIP);
        const int64_t left = s.max_costs[index] - smallest_cost(router);
        if (s.aligned[index] != index)
            std::copy_n(s.paths + s.aligned[index] * num_layers, num_layers, path);
        else if (router.num_actions == 2)
            run_best(router, scored, left, path);
        else
            mix_best(router, scored, left, path);
        std::copy_n(path, num_layers, last_path);
    }

    // The free layers by falling score, of equals the lower first, as long as the cost allows.
    void run_best(const Router& router, const float* scored, int64_t left, int8_t* path) {
        const auto more = [&](int64_t layer) { return cost_of(router, layer, RUN) - cost_of(router, layer, SKIP); };
        for (;;) {
            int64_t best = -1;
            for (size_t i = 0; i < free.size(); ++i)
                if (path[free[i]] == SKIP && more(free[i]) <= left && (best < 0 || scored[i] > scored[best])) best = static_cast<int64_t>(i);
            if (best < 0) return;
            path[free[best]] = RUN;
            left -= more(free[best]);
        }
    }

    // All free layers if the cost allows, else their actions with the highest sum of scores: an exact knapsack. All free
    // layers cost the same, so what a path costs follows from how many run and how many have the small FFN. Row [i][r] of
    // `sums` has the highest sum of the first i layers of which r run and s have it, at LANES + s; before it are -inf.
    void mix_best(const Router& router, const float* scored, int64_t left, int8_t* path) {
        const auto count = static_cast<int64_t>(free.size());
        const int64_t run_cost = cost_of(router, free[0], RUN), small_cost = cost_of(router, free[0], SMALL);
        if (left >= count * run_cost) {
            for (const int64_t layer : free) path[layer] = RUN;
            return;
        }
        const int64_t most_runs = std::min(count, left / run_cost), stride = LANES + padded(count + 1, LANES);
        // A row more before the first, so that there is one with a run less.
        sums.assign((count + 1) * (most_runs + 2) * stride, -INFINITY);
        const auto row = [&](int64_t i, int64_t runs) { return &sums[(i * (most_runs + 2) + runs + 1) * stride + LANES]; };
        row(0, 0)[0] = 0.f;
        for (int64_t i = 0; i < count; ++i) {
            const Vec run = splat(scored[2 * i]), small = splat(scored[2 * i + 1]);
            for (int64_t runs = 0; runs <= most_runs; ++runs) {
                const float *const before = row(i, runs), *const with_run = row(i, runs - 1);
                for (int64_t s = 0; s <= count; s += LANES)
                    store(row(i + 1, runs) + s, max(max(load(before + s), load(with_run + s) + run), load(before + s - 1) + small));
            }
        }
        int64_t runs = 0, smalls = 0;
        for (int64_t r = 0; r <= most_runs; ++r)
            for (int64_t s = 0; s <= count && r * run_cost + s * small_cost <= left; ++s)
                if (row(count, r)[s] > row(count, runs)[smalls]) runs = r, smalls = s;
        for (int64_t i = count - 1; i >= 0; --i) {
            const float value = row(i + 1, runs)[smalls];
            if (row(i, runs)[smalls] == value) continue;
            if (row(i, runs - 1)[smalls] + scored[2 * i] == value)
                path[free[i]] = RUN, --runs;
            else
                path[free[i]] = SMALL, --smalls;
        }
    }

    static int64_t cost_of(const Router& router, int64_t layer, int64_t action) {
        return router.costs[layer * router.num_actions + action];
    }

    const int64_t num_layers, width;
    int64_t num_scores = 0;
    std::vector<int64_t> free;
    std::vector<float> features, hidden, scores, sums;
};

}  // namespace buddy
