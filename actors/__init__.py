"""Generation: an engine kept full, tickets turned into scored groups, and the policy clock followed in flight."""
