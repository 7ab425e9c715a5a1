-- ARGV: month, cost and id of the claim.
local month, cost, id = ARGV[5], ARGV[6], ARGV[7]
if not has_ended(id) then
    stop(month, cost, id)
    recount(id, '0')
    redis.call('ZREM', WINDOW, id)
    redis.call('HDEL', COSTS, id)
    finish(id)
end
keep()
