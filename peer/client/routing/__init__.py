"""Chooses the servers of a route from a live view of the swarm."""
