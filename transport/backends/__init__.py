"""The ways for bytes to reach a peer; `base` is the interface, every other module one backend."""
