-- KEYS[6] is the claim's month. ARGV: month, cost and id of the claim, then the limits of requests and cost in a
-- minute, of running requests and of cost in a month, each empty for none. Returns, as numbers: for how long the minute
-- refuses the claim by requests and by cost (0 not at all, -1 for ever), whether too many requests run and the month is
-- used up (1 or 0), then requests and cost in the minute, the time until it is empty, and the month's cost.
local month, cost, id = ARGV[5], ARGV[6], ARGV[7]
local max_requests, max_cost, max_running, max_month =
    tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local NEVER = -1

local function leaves_in(reserved_at)
    return reserved_at + window_us - now
end

local function requests_wait(num_requests)
    if not max_requests or num_requests < max_requests then
        return 0
    end
    local rank = num_requests - max_requests
    local last = redis.call('ZRANGE', WINDOW, rank, rank, 'WITHSCORES')
    return last[2] and leaves_in(last[2]) or NEVER
end

-- Sums of seconds lead to the second in which enough cost leaves, since a minute may have very many requests.
local function cost_wait(minute_cost)
    local excess = minute_cost + cost - (max_cost or math.huge)
    if excess <= 0 then
        return 0
    end
    if tonumber(cost) > max_cost then
        return NEVER
    end
    for second = second_of(now - window_us), second_of(now) do
        local second_cost = sum('second:' .. text(second))
        if second_cost < excess then
            excess = excess - second_cost
        else
            local start = second * 1000000
            local entries = redis.call('ZRANGEBYSCORE', WINDOW, text(start), text(start + 999999), 'WITHSCORES')
            for index = 1, #entries, 2 do
                excess = excess - redis.call('HGET', COSTS, entries[index])
                if excess <= 0 then
                    return leaves_in(entries[index + 1])
                end
            end
        end
    end
    return NEVER
end

local function month_cost()
    return (redis.call('GET', KEYS[6]) or 0) + sum('reserved:' .. month)
end

local requests_us, cost_us = requests_wait(redis.call('ZCARD', WINDOW)), cost_wait(sum('minute'))
local over_running = max_running and redis.call('ZCARD', LEASES) + 1 > max_running
local over_month = max_month and month_cost() + cost > max_month
if requests_us == 0 and cost_us == 0 and not over_running and not over_month then
    redis.call('ZADD', WINDOW, text(now), id)
    redis.call('HSET', COSTS, id, cost)
    add_minute(now, tonumber(cost))
    run(month, cost, id)
end
keep()
local newest = redis.call('ZRANGE', WINDOW, -1, -1, 'WITHSCORES')
return {
    requests_us, cost_us, over_running and 1 or 0, over_month and 1 or 0,
    redis.call('ZCARD', WINDOW), sum('minute'), newest[2] and leaves_in(newest[2]) or 0, month_cost(),
}
