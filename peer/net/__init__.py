"""A peer's host, and below it the connection layers for py-libp2p, cancel-safe and fast.

From the wire upwards:

wire/byte_pipe.py    a socket (or any libp2p raw connection) as three calls
wire/pnet.py         a private swarm's key around all of it; no I/O (wire/pnet_stream.py is its shell)
wire/noise.py        ciphertext frames in, plaintext out, and back; no I/O
wire/multistream.py  who speaks what: multistream-select; no I/O
wire/yamux.py        the session machine: frames, windows, limits; no I/O
wire/muxer.py        the only shell: one reader task and one writer task per connection, streams for everybody else
libp2p/swarm.py      the plug: an ordinary py-libp2p Swarm on top of all this
nat/                 relays, reachability probes and hole punching
host.py              the seam that all other folders use

docs/transport.md explains the whole; the first three could serve any loop.
"""
