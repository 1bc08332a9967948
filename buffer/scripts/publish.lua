#!lua flags=allow-oom
-- A new policy version: manifest and clock move together. Repeating the newest publication changes nothing.
-- ARGV: epoch, version, step, manifest JSON, manifests to keep
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
local versions = {}
for _, name in ipairs(redis.call('HKEYS', WEIGHTS)) do
    if name ~= 'latest' then versions[#versions + 1] = tonumber(name) end
end
table.sort(versions)
for position = 1, #versions - tonumber(ARGV[5]) do
    redis.call('HDEL', WEIGHTS, string.format('%d', versions[position]))
end
redis.call('HSET', CLOCK, 'version', ARGV[2], 'step', ARGV[3], 'published_at', now_ms())
notify(EVENTS, 'version', ARGV[2])
notify(VERSIONS, 'version', ARGV[2])
return 1
