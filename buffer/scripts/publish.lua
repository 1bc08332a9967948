#!lua flags=allow-oom
-- A new policy version: manifest and clock move together. Repeating the newest publication changes nothing.
-- ARGV: epoch, version, step, manifest JSON, versions whose manifests go...
-- Errors: FENCED, INVALID (version does not advance).
fence(ARGV[1])
local version = tonumber(ARGV[2])
local current = tonumber(redis.call('HGET', CLOCK, 'version'))
if version <= current then
    if redis.call('HGET', WEIGHTS, ARGV[2]) == ARGV[4] then return 0 end
    return redis.error_reply('INVALID version ' .. ARGV[2] .. ' is not above the published version ' .. current)
end
-- an epoch counts its groups from its first version, whatever number that got
if redis.call('HGET', CLOCK, 'published_epoch') ~= ARGV[1] then
    redis.call('HSET', CLOCK, 'base_version', ARGV[2], 'published_epoch', ARGV[1])
end
redis.call('HSET', WEIGHTS, ARGV[2], ARGV[4], 'latest', ARGV[2])
for position = 5, #ARGV do
    if ARGV[position] ~= ARGV[2] then redis.call('HDEL', WEIGHTS, ARGV[position]) end
end
redis.call('HSET', CLOCK, 'version', ARGV[2], 'step', ARGV[3], 'published_at', now_ms())
notify(EVENTS, 'version', ARGV[2])
notify(VERSIONS, 'version', ARGV[2])
return 1
