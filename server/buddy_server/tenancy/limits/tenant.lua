-- What Redis keeps of one tenant; the other scripts go on from here. Times are microseconds, costs milli-layers.
--   window  sorted set: the requests of the last minute, by the time of their reservation
--   costs   hash: what each of them counts in the minute
--   leases  sorted set: the running requests as "MONTH:COST:ID", by the time when their lease runs out
--   ended   sorted set: requests settled or withdrawn, by that time, so that they are not counted twice
--   sums    hash of costs: "minute" of the window, "second:N" of its requests that were reserved in second N,
--           "reserved:MONTH" of the running requests
-- All five expire together. A sixth key holds what a month's settled requests cost.
local WINDOW, COSTS, LEASES, ENDED, SUMS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, window_us, lease_us, kept_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000000 + time[2]
end

-- Lua would write large numbers with an exponent.
local function text(number)
    return string.format('%.0f', number)
end

local function second_of(time)
    return math.floor(time / 1000000)
end

local function sum(field)
    return tonumber(redis.call('HGET', SUMS, field) or 0)
end

local function add(field, cost)
    if cost ~= 0 and redis.call('HINCRBY', SUMS, field, text(cost)) == 0 then
        redis.call('HDEL', SUMS, field)
    end
end

local function add_minute(reserved_at, cost)
    add('minute', cost)
    add('second:' .. text(second_of(reserved_at)), cost)
end

-- The request counts `cost` in the minute, if it is still of the minute.
local function recount(id, cost)
    local reserved_at = redis.call('ZSCORE', WINDOW, id)
    if reserved_at then
        add_minute(reserved_at, cost - redis.call('HGET', COSTS, id))
        redis.call('HSET', COSTS, id, cost)
    end
end

local function run(month, cost, id)
    redis.call('ZADD', LEASES, text(now + lease_us), month .. ':' .. cost .. ':' .. id)
    add('reserved:' .. month, tonumber(cost))
end

local function stop(month, cost, id)
    if redis.call('ZREM', LEASES, month .. ':' .. cost .. ':' .. id) == 1 then
        add('reserved:' .. month, -cost)
    end
end

local function has_ended(id)
    return redis.call('ZSCORE', ENDED, id)
end

local function finish(id)
    redis.call('ZADD', ENDED, text(now), id)
end

local function keep()
    for index = 1, 5 do
        redis.call('PEXPIRE', KEYS[index], kept_ms)
    end
end

-- Let go of what no longer counts.
for _, lease in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', text(now))) do
    local month, cost, id = string.match(lease, '^([^:]*):([^:]*):(.*)$')
    stop(month, cost, id)
    recount(id, '0')
end
local window_start = text(now - window_us)
local left = redis.call('ZRANGEBYSCORE', WINDOW, '-inf', window_start, 'WITHSCORES')
for index = 1, #left, 2 do
    add_minute(left[index + 1], -redis.call('HGET', COSTS, left[index]))
    redis.call('HDEL', COSTS, left[index])
end
redis.call('ZREMRANGEBYSCORE', WINDOW, '-inf', window_start)
redis.call('ZREMRANGEBYSCORE', ENDED, '-inf', window_start)
