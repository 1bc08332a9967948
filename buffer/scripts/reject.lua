#!lua flags=allow-oom
-- A leased group whose bytes are no group: its ticket fails. ARGV: epoch, id, error text
-- Returns 1, or 0 if the entry is gone. Errors: FENCED.
local ticket = take(fence(ARGV[1]), ARGV[2])
if not ticket then return 0 end
count('poisoned', 1)
retry_or_bury(ticket, ARGV[3])
notify(EVENTS, 'retry', 1)
notify(SPACE, 'retry', 1)
return 1
