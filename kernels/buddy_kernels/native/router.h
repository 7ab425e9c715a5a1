// Which layers each segment runs: features of the first layer's V, the Decision Module's scores, the best that the
// budget pays for. planner.py and selection.py are the reference.
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
        for (int64_t layer = 0; layer < num_layers; ++layer) cost += router.costs[2 * layer + router.forced[layer]];
        return cost;
    }

    // Writes each segment's path. `state(row, i)` is the first layer's V as the cache has it.
    template <class State>
    void choose(Step& s, const Router& router, const std::vector<Segment>& segments, const State& state) {
        free.clear();
        for (int64_t layer = 0; layer < num_layers; ++layer)
            if (!router.forced[layer]) free.push_back(layer);
        scores.assign(segments.size() * free.size(), 0.f);
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
        const auto count = static_cast<int64_t>(free.size());
        float* const into = &scores[s.aligned[index] * count];
        for (int64_t i = 0; i < count; ++i) into[i] += router.prior[i];
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
        for (int64_t i = 0; i < count; ++i) {
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
        if (s.aligned[index] != index)
            std::copy_n(s.paths + s.aligned[index] * num_layers, num_layers, path);
        else
            run_best(router, &scores[index * static_cast<int64_t>(free.size())], s.max_costs[index], path);
        std::copy_n(path, num_layers, last_path);
    }

    // The free layers by falling score, of equals the lower first, as long as the cost allows.
    void run_best(const Router& router, const float* scored, int64_t max_cost, int8_t* path) {
        for (int64_t layer = 0; layer < num_layers; ++layer) path[layer] = static_cast<int8_t>(router.forced[layer] ? RUN : SKIP);
        int64_t left = max_cost - smallest_cost(router);
        const auto more = [&](int64_t layer) { return router.costs[2 * layer + RUN] - router.costs[2 * layer + SKIP]; };
        for (;;) {
            int64_t best = -1;
            for (size_t i = 0; i < free.size(); ++i)
                if (path[free[i]] == SKIP && more(free[i]) <= left && (best < 0 || scored[i] > scored[best])) best = static_cast<int64_t>(i);
            if (best < 0) return;
            path[free[best]] = RUN;
            left -= more(free[best]);
        }
    }

    const int64_t num_layers, width;
    std::vector<int64_t> free;
    std::vector<float> features, hidden, scores;
};

}  // namespace buddy
