#!lua flags=allow-oom
-- Prolong leases. ARGV: lease in ms, ticket...   Returns the tickets whose lease is gone.
local expiry = now_ms() + tonumber(ARGV[1])
local gone = {}
for position = 2, #ARGV do
    if redis.call('ZSCORE', GENERATING, ARGV[position]) then
        redis.call('ZADD', GENERATING, 'XX', expiry, ARGV[position])
    else
        gone[#gone + 1] = ARGV[position]
    end
end
return gone
