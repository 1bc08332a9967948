#!lua flags=allow-oom
-- Generation or scoring of a ticket failed. ARGV: ticket, error text   Returns 1, or 0 if its lease was gone.
if redis.call('ZREM', GENERATING, ARGV[1]) == 0 then return 0 end
count('generating', -1)
count('failed', 1)
retry_or_bury(ARGV[1], ARGV[2])
notify(EVENTS, 'retry', 1)
return 1
