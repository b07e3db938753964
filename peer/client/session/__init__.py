"""A session over all hops of a route, and what it does when one fails."""
