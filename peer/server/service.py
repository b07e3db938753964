"""A server's life: choose, load, accept, announce, drain - in this order, in one nursery."""

from __future__ import annotations
