"""Malformed inputs of every kind, each under its name, and the guard under which they are tried."""
