"""What actors, buffer and learner say to each other: data, wire format, clock arithmetic, settings, errors.

Nothing here imports torch, ray, vllm or redis, so every process can import all of it in a few milliseconds.
"""
