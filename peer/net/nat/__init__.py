"""Ways around routers: relays, reachability probes and hole punching."""
