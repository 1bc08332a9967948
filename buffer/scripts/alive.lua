#!lua flags=no-writes
-- Actors with a recent heartbeat. ARGV: most age in ms   Returns {name, age in ms, status JSON}...
local now = now_ms()
local reply = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', HEARTBEATS, now - tonumber(ARGV[1]), '+inf')) do
    local age = now - tonumber(redis.call('ZSCORE', HEARTBEATS, name))
    reply[#reply + 1] = {name, age, redis.call('HGET', ACTORS, name)}
end
return reply
