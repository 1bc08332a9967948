#!lua flags=allow-oom
-- A checkpoint holds the effect of these groups: they are trained, once, and gone. ARGV: epoch, step, id...
-- Returns how many were counted. Errors: FENCED.
local group = fence(ARGV[1])
local num_trained, num_before = 0, 0
for position = 3, #ARGV do
    local ticket, leased = take(group, ARGV[position])
    if ticket then
        num_trained = num_trained + 1
        if not leased then num_before = num_before + 1 end
    end
end
if num_trained > 0 then
    count('trained', num_trained)
    -- a group not leased in this epoch was trained before it began (the last incarnation died between checkpoint and
    -- commit), so it belongs to the base from which this epoch counts
    redis.call('HINCRBY', CLOCK, 'base', num_before)
    notify('commit', ARGV[2])
end
return num_trained
