"""Runs steps of blocks for many sessions: scheduling, cache budgets, quotas and stream rules."""
