"""The engine of training: processes, sharding, one optimiser step."""
