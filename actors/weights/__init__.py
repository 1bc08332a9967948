"""The actor's end of the weight path: fetching ahead of time, and putting tensors into vLLM's model in place."""
