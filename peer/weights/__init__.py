"""Weights between peers: sharing pieces of a checkpoint, and fetching and checking them."""
