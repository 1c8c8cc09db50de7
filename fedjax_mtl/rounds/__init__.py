"""Rounds: the engine that runs a cohort, and the compositions that stand on it."""
