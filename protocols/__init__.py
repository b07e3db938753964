"""What peers say to each other: messages, codecs and rules, without I/O but for stream.py."""
