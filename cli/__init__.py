"""The command line: parses flags, runs a peer, prints what happens."""
