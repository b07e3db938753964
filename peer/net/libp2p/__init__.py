"""The plug into py-libp2p: a Swarm of the library that runs on our connections."""
