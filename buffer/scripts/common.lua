-- Shared by every script of this directory, which it precedes. KEYS are those of buffer/keys.py, in its order.
local CLOCK, TICKETS, GENERATING, RETRY, GROUPS, PAYLOADS, DEAD, WEIGHTS, EVENTS, ACTORS, HEARTBEATS, CONTROL =
    unpack(KEYS)
local EVENTS_KEPT = 1000

-- Server time in milliseconds: the only clock that leases, heartbeats and publications know.
local function now_ms()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Move a counter of the ledger. Formatted, because Redis 7.0 would send a Lua -0 as "-0", which is no integer to it.
local function count(counter, by)
    redis.call('HINCRBY', TICKETS, counter, string.format('%d', by))
end

local function counter(name)
    return tonumber(redis.call('HGET', TICKETS, name) or 0)
end

-- Wake whoever waits.
local function notify(kind, detail)
    redis.call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_KEPT, '*', 'kind', kind, 'detail', detail)
end

-- Position after the newest notice.
local function cursor()
    local newest = redis.call('XREVRANGE', EVENTS, '+', '-', 'COUNT', 1)
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
    if #overdue > 0 then notify('retry', #overdue) end
    return #overdue
end

-- Remove a group from the stream. Returns its ticket and whether this epoch had leased it; nil if it is gone.
local function take(group, id)
    local entry = redis.call('XRANGE', GROUPS, id, id)[1]
    if not entry then return nil end
    local ticket, bytes = entry[2][2], tonumber(entry[2][4])
    local state = redis.call('XACK', GROUPS, group, id) == 1 and 'leased' or 'buffered'
    redis.call('XDEL', GROUPS, id)
    redis.call('HDEL', PAYLOADS, id)
    count(state, -1)
    count(state .. '_bytes', -bytes)
    return ticket, state == 'leased'
end
