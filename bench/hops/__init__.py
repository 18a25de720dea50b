"""Real vLLM and what images cost between its processes: the inside of `bench vllm`."""
