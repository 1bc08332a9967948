#!lua flags=allow-oom
-- An actor leaves work undone: its tickets come first in the retry queue, in their order, and no failure is counted.
-- ARGV: ticket...   Returns how many leases there were to give back.
local num_returned = 0
for position = #ARGV, 1, -1 do
    if redis.call('ZREM', GENERATING, ARGV[position]) == 1 then
        redis.call('LPUSH', RETRY, ARGV[position])
        num_returned = num_returned + 1
    end
end
if num_returned > 0 then
    count('generating', -num_returned)
    count('retry', num_returned)
    count('returned', num_returned)
    notify(EVENTS, 'retry', num_returned)
end
return num_returned
