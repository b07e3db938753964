"""`petals.server` as Petals had it; its insides are in `petals.peer.server`."""
