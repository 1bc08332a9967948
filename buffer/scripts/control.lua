#!lua flags=allow-oom
-- Set the state of the run. ARGV: state, reason
redis.call('HSET', CONTROL, 'state', ARGV[1], 'reason', ARGV[2])
notify(EVENTS, 'state', ARGV[1])
return 1
