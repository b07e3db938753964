"""Offers blocks to the swarm: chooses, loads, announces and drains them."""
