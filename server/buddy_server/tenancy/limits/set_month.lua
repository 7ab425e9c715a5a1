-- KEYS[1] is a tenant's month. ARGV: what it has cost at least, how long it is kept.
if tonumber(ARGV[1]) > tonumber(redis.call('GET', KEYS[1]) or 0) then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
