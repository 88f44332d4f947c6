"""Seeded experiments that show what normalization does to a network, and what it does not."""
