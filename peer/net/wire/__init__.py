"""Bytes between two peers: Noise, yamux, private networks and circuits, mostly without I/O."""
