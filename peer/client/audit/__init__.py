"""Checks servers' answers against each other and remembers who was wrong."""
