#!lua flags=allow-oom
-- Tickets that were given up are tried again, with all their attempts. ARGV: index...; none means all
-- Returns how many.
local wanted = {}
for position = 1, #ARGV do wanted[ARGV[position]] = true end
local num_retried = 0
for _, entry in ipairs(redis.call('XRANGE', DEAD, '-', '+')) do
    local index = entry[2][2]
    if #ARGV == 0 or wanted[index] then
        redis.call('XDEL', DEAD, entry[1])
        redis.call('RPUSH', RETRY, index .. ':0')
        num_retried = num_retried + 1
    end
end
if num_retried > 0 then
    count('dead', -num_retried)
    count('retry', num_retried)
    notify(EVENTS, 'retry', num_retried)
end
return num_retried
