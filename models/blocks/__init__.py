"""A span of transformer blocks: its caches, its adapters, and the ways to run it."""
