#!lua
-- Deliver the group of a lease, whose payload was sent just before. ARGV: ticket, name of the payload
-- Returns {1} accepted; {0} the lease is gone; {2, waiting bytes, most bytes, cursor of SPACE} no room now; {3} the
-- payload is gone, send it again. A payload that was not accepted is deleted.
local ticket, key = ARGV[1], payload_key(ARGV[2])
local bytes, milliseconds_left = redis.call('STRLEN', key), redis.call('PTTL', key)
if milliseconds_left == -1 then return {1} end -- this very payload was accepted before; the answer got lost
local counters = redis.call('HMGET', TICKETS, 'generating', 'buffered', 'buffered_bytes')
local waiting, most = tonumber(counters[3] or 0), tonumber(redis.call('HGET', CLOCK, 'max_bytes'))
-- leased groups do not count: only a checkpoint frees them, and a learner may need more groups to get there
local is_full = waiting > 0 and waiting + bytes > most
if is_full and redis.call('ZSCORE', GENERATING, ticket) then
    redis.call('DEL', key)
    redis.call('HSET', TICKETS, 'full', 1)
    return {2, waiting, most, cursor(SPACE)}
end
if milliseconds_left == -2 and redis.call('ZSCORE', GENERATING, ticket) then return {3} end
if redis.call('ZREM', GENERATING, ticket) == 0 then
    redis.call('DEL', key)
    count('refused', 1)
    return {0}
end
redis.call('PERSIST', key)
redis.call('XADD', GROUPS, '*', 'ticket', ticket, 'bytes', bytes, 'payload', ARGV[2])
redis.call('HSET', TICKETS, 'generating', string.format('%d', (counters[1] or 0) - 1),
    'buffered', string.format('%d', (counters[2] or 0) + 1), 'buffered_bytes', string.format('%d', waiting + bytes))
return {1}
