"""The small model of `[model.toy]`: built and warm-started on the spot, then treated like any model directory.

Imports torch and transformers, so only the learner's process calls it.
"""
