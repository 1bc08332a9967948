#!lua flags=allow-oom
-- An actor is gone for good; its last status stays for the totals. ARGV: name, status JSON or "" to keep it
if ARGV[2] ~= '' then redis.call('HSET', ACTORS, ARGV[1], ARGV[2]) end
redis.call('ZREM', HEARTBEATS, ARGV[1])
return 1
