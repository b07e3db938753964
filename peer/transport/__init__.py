"""Noise and yamux for py-libp2p, cancel-safe and fast. What the layers are, from the wire upwards:

pipe.py         a socket (or any libp2p raw connection) as three calls
pnet.py         a private swarm's key around all of it; no I/O (private.py is its shell)
noise.py        ciphertext frames in, plaintext out, and back; no I/O
multistream.py  who speaks what: multistream-select; no I/O
yamux.py        the session machine: frames, windows, limits; no I/O
muxer.py        the only shell: one reader task and one writer task per connection, streams for everybody else
network.py      the plug: an ordinary py-libp2p Swarm on top of all this

docs/transport.md explains the whole; the first three could serve any loop.
"""
