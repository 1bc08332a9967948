#!lua flags=allow-oom
-- A learner starts or restarts: it becomes the only one whose writes count, and gets every uncommitted group again.
-- ARGV: run_id, groups_per_version, max_lag, max_attempts, max_bytes, first_ticket, step
-- Returns the new epoch. Errors: MISMATCH.
local run_id = ARGV[1]
local known = redis.call('HGET', CLOCK, 'run_id')
if known and known ~= run_id then
    return redis.error_reply('MISMATCH the buffer holds run_id ' .. known .. ', this learner belongs to run_id '
        .. run_id .. ': choose another run.name, give the run directory that belongs to it, or remove the old run '
        .. 'with: vespo buffer purge')
end
if not known then
    redis.call('HSET', CLOCK, 'run_id', run_id, 'version', -1, 'epoch', 0)
    redis.call('HSET', TICKETS, 'first', ARGV[6], 'next', ARGV[6])
end

local epoch = redis.call('HINCRBY', CLOCK, 'epoch', 1)
if known then redis.call('XGROUP', 'DESTROY', GROUPS, 'learner:' .. (epoch - 1)) end
-- a new group from the start: what the last incarnation had leased is delivered again, in the order of the stream
redis.call('XGROUP', 'CREATE', GROUPS, 'learner:' .. epoch, '0', 'MKSTREAM')
count('buffered', counter('leased'))
count('buffered_bytes', counter('leased_bytes'))
redis.call('HSET', TICKETS, 'leased', 0, 'leased_bytes', 0)

redis.call('HSET', CLOCK, 'groups_per_version', ARGV[2], 'max_lag', ARGV[3], 'max_attempts', ARGV[4],
    'max_bytes', ARGV[5], 'step', ARGV[7], 'base', counter('trained'),
    'base_version', redis.call('HGET', CLOCK, 'version') + 1)
redis.call('HSET', CONTROL, 'state', 'running', 'reason', '')
notify(EVENTS, 'epoch', epoch)
notify(SPACE, 'epoch', epoch)
return epoch
