"""`petals doctor`: checks machine, packages, network and swarm, and says what to do."""
