#!lua flags=allow-oom
-- Re-derive everything that can be derived, so that every ticket is in exactly one place and the counters say so.
-- What is done stays done. A ticket found in several places keeps the first of: done, stream, generating, retry, dead.
-- A ticket found nowhere is generated again; unless the counters remember more done tickets than the bitmap, then the
-- oldest of those found nowhere are taken as done: better not trained than trained twice.
-- Returns {number of tickets done that the bitmap had lost, generated again, groups dropped, leases, retries and dead
-- tickets dropped}. Errors: LOST.
local first, following = redis.call('HGET', TICKETS, 'first'), redis.call('HGET', TICKETS, 'next')
local epoch = redis.call('HGET', CLOCK, 'epoch')
if not (first and following and epoch) then
    return redis.error_reply('LOST the hash of the clock or of the tickets is gone, and nothing else tells which '
        .. 'tickets were issued; remove the run with: vespo buffer purge, and let the learner resume its checkpoint')
end
first, following = tonumber(first), tonumber(following)

local bits = redis.call('GET', DONE) or ''
local function done(index)
    local position = index - first
    return bit.band(string.byte(bits, math.floor(position / 8) + 1) or 0, bit.rshift(128, position % 8)) ~= 0
end
for index = first + 8 * #bits - 1, following, -1 do
    if done(index) then following = index + 1 break end -- what is done was issued
end

local placed, num_placed = {}, {generating = 0, retry = 0, dead = 0}
local function place(ticket, structure)
    local index = tonumber(string.match(ticket or '', '^(%d+):%d+$'))
    if not index or index < first or index >= following or placed[index] or done(index) then return false end
    placed[index] = true
    if structure then num_placed[structure] = num_placed[structure] + 1 end
    return true
end

-- the stream and its consumer group
local group = 'learner:' .. epoch
local pending = redis.pcall('XPENDING', GROUPS, group, '-', '+', 10000000)
if pending.err then
    redis.call('XGROUP', 'CREATE', GROUPS, group, '0', 'MKSTREAM')
    pending = {}
end
local delivered = '0-0'
for _, reader in ipairs(redis.call('XINFO', 'GROUPS', GROUPS)) do
    for field = 1, #reader, 2 do
        if reader[field] == 'last-delivered-id' then delivered = reader[field + 1] end
    end
end
local is_pending = {}
for _, entry in ipairs(pending) do is_pending[entry[1]] = true end
local kept, num_groups_dropped = {}, 0
local num_entries, num_bytes = {[true] = 0, [false] = 0}, {[true] = 0, [false] = 0}
for _, entry in ipairs(redis.call('XRANGE', GROUPS, '-', '+')) do
    local id, ticket, bytes, payload = entry[1], entry[2][2], tonumber(entry[2][4] or ''), payload_key(entry[2][6] or '')
    local leased = not is_after(id, delivered)
    if bytes and bytes > 0 and bytes == redis.call('STRLEN', payload) and place(ticket) then
        kept[id] = true
        if leased and not is_pending[id] then redis.call('XCLAIM', GROUPS, group, 'learner', 0, id, 'FORCE', 'JUSTID') end
        num_entries[leased] = num_entries[leased] + 1
        num_bytes[leased] = num_bytes[leased] + bytes
    else
        redis.call('XDEL', GROUPS, id)
        redis.call('DEL', payload)
        num_groups_dropped = num_groups_dropped + 1
    end
end
for id in pairs(is_pending) do
    if not kept[id] then redis.call('XACK', GROUPS, group, id) end
end

-- everywhere else a ticket can be
local num_dropped = 0
for _, ticket in ipairs(redis.call('ZRANGE', GENERATING, 0, -1)) do
    if not place(ticket, 'generating') then num_dropped = num_dropped + redis.call('ZREM', GENERATING, ticket) end
end
local retries = redis.call('LRANGE', RETRY, 0, -1)
redis.call('DEL', RETRY)
for _, ticket in ipairs(retries) do
    if place(ticket, 'retry') then redis.call('RPUSH', RETRY, ticket) else num_dropped = num_dropped + 1 end
end
for _, entry in ipairs(redis.call('XRANGE', DEAD, '-', '+')) do
    if not place((entry[2][2] or '') .. ':0', 'dead') then num_dropped = num_dropped + redis.call('XDEL', DEAD, entry[1]) end
end

-- tickets that are nowhere
local num_done = redis.call('BITCOUNT', DONE)
local num_forgotten = math.max(0, counter('trained') + counter('filtered') - num_done)
local num_again, num_remembered = 0, 0
for index = first, following - 1 do
    if not placed[index] and not done(index) then
        if num_remembered < num_forgotten then
            redis.call('SETBIT', DONE, index - first, 1)
            num_remembered = num_remembered + 1
        else
            redis.call('RPUSH', RETRY, string.format('%d:0', index))
            num_again = num_again + 1
        end
    end
end

num_done = num_done + num_remembered
local num_filtered = math.min(counter('filtered'), num_done)
redis.call('HSET', TICKETS, 'next', string.format('%d', following), 'issued', string.format('%d', following - first),
    'generating', num_placed.generating, 'retry', num_placed.retry + num_again, 'dead', num_placed.dead,
    'buffered', num_entries[false], 'leased', num_entries[true], 'buffered_bytes', num_bytes[false],
    'leased_bytes', num_bytes[true], 'trained', num_done - num_filtered, 'filtered', num_filtered)
notify(EVENTS, 'retry', num_again)
notify(SPACE, 'repair', num_groups_dropped)
return {num_remembered, num_again, num_groups_dropped, num_dropped}
