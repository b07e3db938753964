"""`petals status`: asks a swarm or a peer's gateway for its state, and draws it."""
