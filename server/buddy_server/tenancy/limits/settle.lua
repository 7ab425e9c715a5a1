-- KEYS[6] is the claim's month. ARGV: month, cost and id of the claim, the used cost, how long the month is kept.
local month, cost, id, used, month_kept_ms = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
if not has_ended(id) then
    stop(month, cost, id)
    recount(id, used)
    redis.call('INCRBY', KEYS[6], used)
    redis.call('PEXPIRE', KEYS[6], month_kept_ms)
    finish(id)
end
keep()
