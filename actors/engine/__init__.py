"""Generation engines behind one protocol: vLLM driven in process, and a scripted one for tests of everything else."""
