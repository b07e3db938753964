"""Being part of a swarm: joining, being found and reached, and knowing who else is there."""
