#!lua flags=allow-oom
-- Groups too old to train on: their tickets are generated again. ARGV: epoch, id...
-- Returns how many went back. Errors: FENCED.
local group = fence(ARGV[1])
local num_stale = 0
for position = 2, #ARGV do
    local ticket = take(group, ARGV[position])
    if ticket then
        redis.call('RPUSH', RETRY, ticket)
        num_stale = num_stale + 1
    end
end
if num_stale > 0 then
    count('retry', num_stale)
    count('stale', num_stale)
    notify(EVENTS, 'retry', num_stale)
    notify(SPACE, 'retry', num_stale)
end
return num_stale
