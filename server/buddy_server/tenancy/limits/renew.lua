-- ARGV: month, cost and id of each claim.
for index = 5, #ARGV, 3 do
    local month, cost, id = ARGV[index], ARGV[index + 1], ARGV[index + 2]
    if not has_ended(id) then
        stop(month, cost, id)
        run(month, cost, id)
        recount(id, cost)
    end
end
keep()
