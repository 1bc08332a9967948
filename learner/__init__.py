"""The learner: takes complete groups from the buffer, updates the policy with DeepSpeed, publishes versions.

The only room that imports torch and deepspeed at the top of its modules.
"""
