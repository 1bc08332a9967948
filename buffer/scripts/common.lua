-- Shared by every script of this directory, which it precedes. KEYS are those of buffer/keys.py, in its order.
local CLOCK, TICKETS, GENERATING, RETRY, GROUPS, PAYLOAD, DEAD, DONE, WEIGHTS, EVENTS, VERSIONS, SPACE, ACTORS,
    HEARTBEATS, CONTROL = unpack(KEYS)
local NOTICES_KEPT = 1000

-- Server time in milliseconds: the only clock that leases, heartbeats and publications know.
local function now_ms()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function payload_key(name)
    return PAYLOAD .. ':' .. name
end

-- Move a counter of the ledger. Formatted, because Redis 7.0 would send a Lua -0 as "-0", which is no integer to it.
local function count(counter, by)
    redis.call('HINCRBY', TICKETS, counter, string.format('%d', by))
end

local function counter(name)
    return tonumber(redis.call('HGET', TICKETS, name) or 0)
end

-- Wake whoever waits on a stream: EVENTS, VERSIONS or SPACE.
local function notify(stream, kind, detail)
    redis.call('XADD', stream, 'MAXLEN', '~', NOTICES_KEPT, '*', 'kind', kind, 'detail', detail)
end

-- Position after the newest notice of a stream.
local function cursor(stream)
    local newest = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
    return newest[1] and newest[1][1] or '0-0'
end

-- Refuse a learner that is not the run's current one. Call before any write.
local function fence(epoch)
    local current = redis.call('HGET', CLOCK, 'epoch')
    if current ~= epoch then
        error({err = 'FENCED learner epoch ' .. epoch .. ' is not the current one, which is '
            .. (current or 'none') .. '; this learner must stop'})
    end
    return 'learner:' .. epoch
end

-- Count one more failure of a ticket that is in no structure now: to the end of the retry queue, or given up.
local function retry_or_bury(ticket, why)
    local index, attempt = string.match(ticket, '^(%d+):(%d+)$')
    local attempts = tonumber(attempt) + 1
    if attempts < tonumber(redis.call('HGET', CLOCK, 'max_attempts')) then
        redis.call('RPUSH', RETRY, index .. ':' .. string.format('%d', attempts))
        count('retry', 1)
    else
        redis.call('XADD', DEAD, '*', 'index', index, 'attempts', attempts, 'error', why)
        count('dead', 1)
    end
end

-- End overdue leases, at most `limit` of them. Returns how many.
local function expire_overdue(limit)
    local overdue = redis.call('ZRANGEBYSCORE', GENERATING, '-inf', now_ms(), 'LIMIT', 0, limit)
    for _, ticket in ipairs(overdue) do
        redis.call('ZREM', GENERATING, ticket)
        count('generating', -1)
        count('expired', 1)
        retry_or_bury(ticket, 'lease expired: its actor died, hung or lost its connection')
    end
    if #overdue > 0 then notify(EVENTS, 'retry', #overdue) end
    return #overdue
end

-- Whether stream entry `id` comes after `other`.
local function is_after(id, other)
    local ms, number = string.match(id, '^(%d+)-(%d+)$')
    local other_ms, other_number = string.match(other, '^(%d+)-(%d+)$')
    if ms ~= other_ms then return tonumber(ms) > tonumber(other_ms) end
    return tonumber(number) > tonumber(other_number)
end

local function index_of(ticket)
    return tonumber(string.match(ticket, '^%d+'))
end

-- Whether a ticket is trained or filtered; true also for one of a time before this server's data began.
local function is_done(index)
    local position = index - counter('first')
    return position < 0 or redis.call('GETBIT', DONE, position) == 1
end

local function set_done(index)
    redis.call('SETBIT', DONE, index - counter('first'), 1)
end

-- Remove a group from the stream. Returns its ticket and whether this epoch had leased it; nil if it is gone.
local function take(group, id)
    local entry = redis.call('XRANGE', GROUPS, id, id)[1]
    if not entry then return nil end
    local ticket, bytes = entry[2][2], tonumber(entry[2][4])
    local state = redis.call('XACK', GROUPS, group, id) == 1 and 'leased' or 'buffered'
    redis.call('XDEL', GROUPS, id)
    redis.call('DEL', payload_key(entry[2][6]))
    count(state, -1)
    count(state .. '_bytes', -bytes)
    return ticket, state == 'leased'
end

-- A learner is done with the group of a ticket that this server, which lost its last moments, has elsewhere: take the
-- ticket out of wherever it is. Slow, and rare.
local function claim(group, index)
    local following = counter('next')
    if index >= following then -- it lost the issue too, and that of the tickets before
        for between = following, index - 1 do redis.call('RPUSH', RETRY, string.format('%d:0', between)) end
        redis.call('HSET', TICKETS, 'next', string.format('%d', index + 1))
        count('issued', index + 1 - following)
        count('retry', index - following)
        return
    end
    for _, ticket in ipairs(redis.call('ZRANGE', GENERATING, 0, -1)) do
        if index_of(ticket) == index then
            redis.call('ZREM', GENERATING, ticket)
            return count('generating', -1)
        end
    end
    for _, ticket in ipairs(redis.call('LRANGE', RETRY, 0, -1)) do
        if index_of(ticket) == index then
            redis.call('LREM', RETRY, 1, ticket)
            return count('retry', -1)
        end
    end
    for _, entry in ipairs(redis.call('XRANGE', GROUPS, '-', '+')) do
        if index_of(entry[2][2]) == index then return take(group, entry[1]) end
    end
    for _, entry in ipairs(redis.call('XRANGE', DEAD, '-', '+')) do
        if tonumber(entry[2][2]) == index then
            redis.call('XDEL', DEAD, entry[1])
            return count('dead', -1)
        end
    end
end
