#!lua flags=allow-oom
-- Groups that are not worth training on. ARGV: epoch, id...   Returns how many. Errors: FENCED.
local group = fence(ARGV[1])
local num_filtered = 0
for position = 2, #ARGV do
    local ticket = take(group, ARGV[position])
    if ticket then
        set_done(index_of(ticket))
        num_filtered = num_filtered + 1
    end
end
if num_filtered > 0 then
    count('filtered', num_filtered)
    notify(EVENTS, 'filtered', num_filtered)
    notify(SPACE, 'filtered', num_filtered)
end
return num_filtered
