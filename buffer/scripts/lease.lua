#!lua flags=allow-oom
-- Give the learner groups. Repeating a call repeats its reply: what was delivered after `after` comes first.
-- ARGV: epoch, last entry id the learner has seen ("0-0" for none), most groups
-- Returns {server process, events cursor, {id, ticket, bytes, name of the payload}...}. Errors: FENCED.
local group = fence(ARGV[1])
local function read(from)
    local reply = redis.call('XREADGROUP', 'GROUP', group, 'learner', 'COUNT', ARGV[3], 'STREAMS', GROUPS, from)
    return reply and reply[1][2] or {}
end

local entries = read(ARGV[2])
if #entries == 0 then
    entries = read('>')
    local bytes = 0
    for _, entry in ipairs(entries) do bytes = bytes + (tonumber(entry[2][4] or '') or 0) end
    if #entries > 0 then
        count('buffered', -#entries)
        count('leased', #entries)
        count('buffered_bytes', -bytes)
        count('leased_bytes', bytes)
        if redis.call('HDEL', TICKETS, 'full') == 1 then notify(SPACE, 'leased', #entries) end
    end
end
local reply = {string.match(redis.call('INFO', 'server'), 'run_id:(%x+)'), cursor(EVENTS)}
for _, entry in ipairs(entries) do
    if entry[2] and entry[2][6] then -- else other hands deleted or added it; the ledger reports it
        reply[#reply + 1] = {entry[1], entry[2][2], entry[2][4], entry[2][6]}
    end
end
return reply
