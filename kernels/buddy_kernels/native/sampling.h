// From logits to a token, as in sampling.py: with weights in fp32 and their sums in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "interface.h"
#include "vector.h"

namespace buddy {

// How often an answer has each of its tokens.
using Counts = std::vector<std::pair<int64_t, int64_t>>;

class Sampler {
  public:
    // One of the tokens 0 .. vocab - 1. `uniform` is from [0, 1).
    int64_t draw(const float* logits, int64_t vocab, const Wanted& how, const Counts& counts, double uniform) {
        if (how.num_bias || how.allowed || !counts.empty()) logits = adjust(logits, vocab, how, counts);
        const int64_t likeliest = index_of_largest(logits, vocab);
        if (how.temperature == 0) return likeliest;
        weigh(logits, vocab, logits[likeliest], how.temperature);
        if (how.top_k > 0 || how.min_p > 0 || how.top_p < 1) return draw_of_kept(how, uniform, likeliest);
        return draw_of_all(uniform, likeliest);
    }

    // The log probability of `token`, and the likeliest tokens with theirs, best first, of equals the lower first.
    double score(const float* logits, int64_t vocab, int64_t token, int64_t num_likeliest, int64_t* likeliest, double* logprobs) {
        const double most = logits[index_of_largest(logits, vocab)];
        double total = 0;
        for (int64_t i = 0; i < vocab; ++i) total += std::exp(logits[i] - most);
        const double log_total = most + std::log(total);
        best.clear();
        const auto room = static_cast<size_t>(num_likeliest);
        for (int64_t i = 0; i < vocab && room; ++i) {
            if (best.size() == room && !(logits[i] > logits[best.back()])) continue;
            if (best.size() == room) best.pop_back();
            const auto behind = [&](int64_t value, int64_t other) { return logits[value] > logits[other]; };
            best.insert(std::upper_bound(best.begin(), best.end(), i, behind), i);
        }
        for (size_t i = 0; i < best.size(); ++i) likeliest[i] = best[i], logprobs[i] = logits[best[i]] - log_total;
        return logits[token] - log_total;
    }

  private:
    const float* adjust(const float* logits, int64_t vocab, const Wanted& how, const Counts& counts) {
        adjusted.assign(logits, logits + vocab);
        for (const auto& [token, count] : counts)
            adjusted[token] -= static_cast<float>(how.presence_penalty + how.frequency_penalty * static_cast<double>(count));
        for (int64_t i = 0; i < how.num_bias; ++i) adjusted[how.bias_tokens[i]] += static_cast<float>(how.bias[i]);
        if (how.allowed) mask(how.allowed, vocab);
        return adjusted.data();
    }

    // No token whose bit is 0.
    void mask(const uint8_t* allowed, int64_t vocab) {
        constexpr VecI BITS = {1, 2, 4, 8, 16, 32, 64, 128, 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
        int64_t i = 0;
        for (; i + LANES <= vocab; i += LANES) {
            const VecI both = VecI{} + (allowed[i / 8] | allowed[i / 8 + 1] << 8);
            store(&adjusted[i], (both & BITS) != 0 ? load(&adjusted[i]) : Vec{} - INFINITY);
        }
        for (; i < vocab; ++i)
            if (!(allowed[i / 8] >> (i % 8) & 1)) adjusted[i] = -INFINITY;
    }

    // Probabilities but for a factor; the likeliest has 1. Padded with zeros.
    void weigh(const float* logits, int64_t vocab, float most, double temperature) {
        weights.resize(padded(vocab, LANES));
        // A temperature next to nothing still leaves 0 at 0.
        const float scale = static_cast<float>(std::min(1. / temperature, 1e38));
        const auto weight = [&](Vec x) {
            const Vec below = (x - most) * scale;
            // Where exp would stop falling, and for what is no number.
            return below > -87.f ? exp(below) : Vec{};
        };
        int64_t i = 0;
        for (; i + LANES <= vocab; i += LANES) store(&weights[i], weight(load(logits + i)));
        float rest[LANES];
        std::fill_n(rest, LANES, -INFINITY);
        std::copy(logits + i, logits + vocab, rest);
        if (i < vocab) store(&weights[i], weight(load(rest)));
    }

    // By the sums of 16 at once, then within the 16.
    int64_t draw_of_all(double uniform, int64_t likeliest) {
        sums.clear();
        double total = 0;
        for (size_t i = 0; i < weights.size(); i += LANES) sums.push_back(total += sum(load(&weights[i])));
        const double drawn = uniform * total;
        const size_t group = std::upper_bound(sums.begin(), sums.end(), drawn) - sums.begin();
        if (group == sums.size()) return likeliest;
        double passed = group ? sums[group - 1] : 0;
        int64_t last = likeliest;
        for (size_t i = group * LANES; i < (group + 1) * LANES; ++i) {
            if (weights[i] == 0) continue;
            last = static_cast<int64_t>(i);
            if ((passed += weights[i]) > drawn) break;
        }
        return last;
    }

    // From those that top_k, min_p and top_p keep, the likeliest first.
    int64_t draw_of_kept(const Wanted& how, double uniform, int64_t likeliest) {
        tokens.clear();
        double total = 0;
        for (size_t i = 0; i < weights.size(); ++i)
            if (weights[i] > 0 && weights[i] >= how.min_p) tokens.push_back(static_cast<int32_t>(i)), total += weights[i];
        if (tokens.empty()) return likeliest;
        if (how.top_k > 0 && how.top_k < static_cast<double>(tokens.size())) {
            sort_first(static_cast<size_t>(how.top_k));
            total = std::accumulate(tokens.begin(), tokens.end(), 0., [&](double x, int32_t i) { return x + weights[i]; });
        } else {
            // All below that together are less than what top_p leaves out: there is no need to sort them.
            const double least = how.top_p < 1 ? (1 - how.top_p) * total / static_cast<double>(tokens.size()) : 0;
            std::erase_if(tokens, [&](int32_t i) { return weights[i] < least; });
            sort_first(tokens.size());
        }
        // The first always stays, and the one with which top_p is reached.
        sums.clear();
        double passed = 0;
        for (const int32_t token : tokens) {
            sums.push_back(passed += weights[token]);
            if (how.top_p < 1 && passed >= how.top_p * total) break;
        }
        const size_t index = std::upper_bound(sums.begin(), sums.end(), uniform * passed) - sums.begin();
        return tokens[std::min(index, sums.size() - 1)];
    }

    // The likeliest `count`, of equals the lower first; the rest goes.
    void sort_first(size_t count) {
        const auto before = [&](int32_t a, int32_t b) {
            return weights[a] == weights[b] ? a < b : weights[a] > weights[b];
        };
        const auto end = tokens.begin() + static_cast<int64_t>(count);
        if (end != tokens.end()) std::nth_element(tokens.begin(), end, tokens.end(), before);
        tokens.resize(count);
        std::sort(tokens.begin(), tokens.end(), before);
    }

    std::vector<float> weights, adjusted;
    std::vector<double> sums;
    std::vector<int32_t> tokens;
    std::vector<int64_t> best;
};

}  // namespace buddy
