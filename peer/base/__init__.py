"""What every part of a peer uses: configuration, identity, concurrency and rate limits."""
