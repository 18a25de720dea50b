"""One module for each kind of channel that tensors can take; `bench.ways` lists them."""
