"""Starting, watching and reporting runs: the `vespo` command and everything only it needs.

Modules here import no heavy library at their top; processes that compute load theirs when they start.
"""
