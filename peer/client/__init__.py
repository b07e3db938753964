"""Uses blocks of other peers: routes, sessions, audits, training and generation."""
