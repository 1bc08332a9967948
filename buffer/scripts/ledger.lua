#!lua flags=no-writes
-- One snapshot of counters and structures, for the audit.
-- Returns {counters, leases, retry tickets, {id, ticket, bytes, payload bytes}..., pending ids, indices of dead tickets,
-- bitmap of the done}.
local entries = {}
for _, entry in ipairs(redis.call('XRANGE', GROUPS, '-', '+')) do
    local ticket, bytes, payload = entry[2][2] or '', entry[2][4] or '', payload_key(entry[2][6] or '')
    entries[#entries + 1] = {entry[1], ticket, bytes, redis.call('STRLEN', payload)}
end
local pending = {}
local epoch = redis.call('HGET', CLOCK, 'epoch')
if epoch then
    local reply = redis.pcall('XPENDING', GROUPS, 'learner:' .. epoch, '-', '+', 10000000)
    for _, entry in ipairs(reply) do pending[#pending + 1] = entry[1] end
end
local dead = {}
for _, entry in ipairs(redis.call('XRANGE', DEAD, '-', '+')) do dead[#dead + 1] = entry[2][2] or '' end
return {redis.call('HGETALL', TICKETS), redis.call('ZRANGE', GENERATING, 0, -1), redis.call('LRANGE', RETRY, 0, -1),
    entries, pending, dead, redis.call('GET', DONE) or ''}
