"""One server's part of a session: its stream, its standby, and the inputs to replay to it."""
