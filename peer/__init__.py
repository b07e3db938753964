"""A peer of the swarm: one node that joins, serves, uses and shares, and its synchronous face."""
