"""Heads, encoders and optimisers that were tried against the product's: benchmark code, not product."""
