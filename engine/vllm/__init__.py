"""Inside of vLLM: what its processes need to pass tensors through rings. `engine.vllm_plugin` hooks it in."""
