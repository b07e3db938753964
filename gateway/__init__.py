"""HTTP in front of a peer: an OpenAI-compatible API, a chat page and a page about the swarm."""
