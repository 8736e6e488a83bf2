"""Whole models: which normalization layers they have, what can replace these, and how to fold them away."""
