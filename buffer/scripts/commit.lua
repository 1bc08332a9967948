#!lua flags=allow-oom
-- A checkpoint holds the effect of these groups: their tickets are trained, once, and the groups are gone.
-- ARGV: epoch, step, last entry id this learner has seen, then id, ticket...
-- Returns how many were counted. Errors: FENCED.
local group = fence(ARGV[1])
local num_trained, num_before = 0, 0
for position = 4, #ARGV, 2 do
    local id, index = ARGV[position], index_of(ARGV[position + 1])
    if not is_done(index) then
        local ticket, leased = take(group, id)
        if not ticket then claim(group, index) end
        set_done(index)
        num_trained = num_trained + 1
        if not leased and is_after(id, ARGV[3]) then num_before = num_before + 1 end
    end
end
if num_trained > 0 then
    count('trained', num_trained)
    -- a group that this learner has not seen was trained before its epoch began (the last incarnation died between
    -- checkpoint and commit), so it belongs to the base from which this epoch counts
    if num_before > 0 then
        redis.call('HINCRBY', CLOCK, 'base', num_before)
        notify(EVENTS, 'base', num_before)
    end
    notify(SPACE, 'commit', num_trained)
end
return num_trained
