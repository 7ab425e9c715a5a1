// Several steps of one call: rows go on by their next tokens and leave one by one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "interface.h"

namespace buddy {

// Whether a row may make any token.
inline bool allows_any(const Wanted& w, int64_t vocab) {
    if (!w.allowed) return true;
    for (int64_t i = 0; i < vocab; ++i)
        if (w.allowed[i / 8] >> (i % 8) & 1) return true;
    return false;
}

class MultiStep {
  public:
    // Where a row's token goes, in the step at hand.
    struct Output {
        int64_t* token;
        double* logprob;
        int64_t* likeliest;
        double* likeliest_logprobs;
    };

    MultiStep(Step& given, int64_t vocab, int64_t num_layers, int64_t num_features)
        : now(given), given(given), vocab(vocab), num_layers(num_layers), num_features(num_features) {
        if (given.most_steps == 1) return;
        for (int64_t i = 0; i < given.num_segments; ++i) places.push_back(i);
        tokens.assign(given.tokens, given.tokens + given.num_rows);
        positions.assign(given.positions, given.positions + given.num_rows);
        wanted.assign(given.wanted, given.wanted + given.num_wanted);
        gather();
    }

    MultiStep(const MultiStep&) = delete;

    // Which of the wanted rows of the call stands at `index` of the step at hand.
    int64_t place(int64_t index) const { return places.empty() ? index : places[index]; }

    Output output(int64_t index) const {
        const int64_t at = given.num_steps * given.num_wanted + place(index), first = at * given.most_likeliest;
        return {given.next_tokens + at, given.logprobs + at, given.likeliest + first, given.likeliest_logprobs + first};
    }

    // Ends the step at hand; false when it was the last.
    bool go_on() {
        given.router_s = now.router_s;
        for (size_t i = 0; i < places.size(); ++i) {
            int8_t* const path = given.paths + (given.num_steps * given.num_segments + places[i]) * num_layers;
            std::copy_n(now.paths + i * num_layers, num_layers, path);
            std::copy_n(now.sums + i * num_features, num_features, given.sums + places[i] * num_features);
        }
        ++given.num_steps;
        if (given.num_steps == given.most_steps) return false;
        size_t count = 0;
        for (size_t i = 0; i < places.size(); ++i) {
            const int64_t token = given.next_tokens[(given.num_steps - 1) * given.num_wanted + places[i]];
            const int64_t* const end = wanted[i].end_tokens + wanted[i].num_end_tokens;
            if (given.num_steps >= wanted[i].max_tokens || std::find(wanted[i].end_tokens, end, token) != end) continue;
            if (!allows_any(wanted[i], vocab)) continue;
            places[count] = places[i], tokens[count] = token, positions[count] = positions[i] + 1, wanted[count] = wanted[i];
            wanted[count].row = static_cast<int64_t>(count);
            if (wanted[count].uniforms) ++wanted[count].uniforms;
            ++count;
        }
        const bool same = count == places.size();
        places.resize(count), tokens.resize(count), positions.resize(count), wanted.resize(count);
        if (!same && count) gather();
        return count > 0;
    }

    Step now;  // the step at hand

  private:
    // What `now` takes from the call, for the rows that are left.
    void gather() {
        const auto count = static_cast<int64_t>(places.size());
        lengths.assign(count, 1), aheads.assign(count, 0);
        table_starts.clear(), lanes.clear(), max_costs.clear(), aligned.clear(), path_actions.clear();
        leaders.assign(given.num_segments, -1);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = places[i];
            table_starts.push_back(given.table_starts[at]), lanes.push_back(given.lanes[at]);
            max_costs.push_back(given.max_costs[at]), path_actions.push_back(given.path_actions[at]);
            // Those aligned with a row that has left follow the first of them that is left.
            int64_t& leader = leaders[given.aligned[at]];
            if (leader < 0) leader = i;
            aligned.push_back(leader);
        }
        paths.resize(count * num_layers), sums.resize(count * num_features);
        now.num_rows = now.num_segments = now.num_wanted = count;
        now.tokens = tokens.data(), now.positions = positions.data(), now.wanted = wanted.data();
        now.lengths = lengths.data(), now.aheads = aheads.data(), now.table_starts = table_starts.data();
        now.lanes = lanes.data(), now.max_costs = max_costs.data(), now.aligned = aligned.data();
        now.path_actions = path_actions.data(), now.paths = paths.data(), now.sums = sums.data();
    }

    Step& given;
    const int64_t vocab, num_layers, num_features;
    std::vector<int64_t> places;  // of the rows that are left, in the call; empty where it is one step
    std::vector<int64_t> tokens, positions, lengths, aheads, table_starts, lanes, max_costs, aligned, leaders;
    std::vector<uint8_t> path_actions;
    std::vector<Wanted> wanted;
    std::vector<int8_t> paths;
    std::vector<double> sums;
};

}  // namespace buddy
