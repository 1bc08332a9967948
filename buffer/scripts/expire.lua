#!lua flags=allow-oom
-- End overdue leases. ARGV: most to end in this call   Returns how many were ended.
return expire_overdue(tonumber(ARGV[1]))
