#!lua
-- Hand out tickets under the admission rule, retries before new ones.
-- ARGV: version the actor serves, most tickets, lease in ms
-- Returns {reason, events cursor, ticket...}; reason is "ok", "admission", "stopped" or "no run".
if redis.call('EXISTS', CLOCK) == 0 then return {'no run', cursor(EVENTS)} end
if redis.call('HGET', CONTROL, 'state') ~= 'running' then return {'stopped', cursor(EVENTS)} end
expire_overdue(256)

local clock = redis.call('HMGET', CLOCK, 'version', 'groups_per_version', 'max_lag', 'base', 'base_version')
local version = math.min(tonumber(ARGV[1]), tonumber(clock[1]))
local room = 0
if version >= 0 then
    -- protocol.clock.admission_limit
    local limit = tonumber(clock[4]) + (version - tonumber(clock[5]) + tonumber(clock[3]) + 1) * tonumber(clock[2])
    room = limit - counter('buffered') - counter('leased') - counter('trained') - counter('generating')
end
local num_tickets = math.min(room, tonumber(ARGV[2]))
if num_tickets <= 0 then return {'admission', cursor(EVENTS)} end

local expiry = now_ms() + tonumber(ARGV[3])
local next_index = counter('next')
local reply = {'ok', cursor(EVENTS)}
local num_retries = 0
for _ = 1, num_tickets do
    local ticket = redis.call('LPOP', RETRY)
    if ticket then
        num_retries = num_retries + 1
    else
        ticket = string.format('%d:0', next_index)
        next_index = next_index + 1
    end
    redis.call('ZADD', GENERATING, expiry, ticket)
    reply[#reply + 1] = ticket
end
redis.call('HSET', TICKETS, 'next', string.format('%d', next_index))
count('retry', -num_retries)
count('issued', num_tickets - num_retries)
count('generating', num_tickets)
return reply
