"""What the swarm knows about itself: signed records, and the Kademlia directory of them."""
