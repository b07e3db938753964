"""From a MODEL name to a checkpoint on disk, and from a checkpoint to a loaded span of blocks."""
