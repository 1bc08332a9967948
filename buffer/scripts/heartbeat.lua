#!lua flags=allow-oom
-- An actor is alive. ARGV: name, status JSON   Returns 1 if it was not known as alive.
redis.call('HSET', ACTORS, ARGV[1], ARGV[2])
return redis.call('ZADD', HEARTBEATS, now_ms(), ARGV[1])
