"""Real vLLM with and without the plugin; run by `make test-vllm` in an environment of its own."""
