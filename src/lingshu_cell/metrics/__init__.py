"""Judgements of generated cells against real cells: pure functions of arrays, independent of any model."""
