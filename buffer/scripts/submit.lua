#!lua
-- Deliver the group of a lease. ARGV: ticket, encoded group
-- Returns {1} accepted; {0} the lease is gone; {2, waiting bytes, most bytes, events cursor} no room now.
local ticket, payload = ARGV[1], ARGV[2]
if not redis.call('ZSCORE', GENERATING, ticket) then
    count('refused', 1)
    return {0}
end
-- leased groups do not count: only a checkpoint frees them, and a learner may need more groups to get there
local waiting, most = counter('buffered_bytes'), tonumber(redis.call('HGET', CLOCK, 'max_bytes'))
if waiting > 0 and waiting + #payload > most then
    redis.call('HSET', TICKETS, 'full', 1)
    return {2, waiting, most, cursor()}
end
local id = redis.call('XADD', GROUPS, '*', 'ticket', ticket, 'bytes', #payload)
redis.call('HSET', PAYLOADS, id, payload)
redis.call('ZREM', GENERATING, ticket)
count('generating', -1)
count('buffered', 1)
count('buffered_bytes', #payload)
return {1}
