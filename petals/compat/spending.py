"""Petals' stub of a currency. Here there is none: docs/contribution.md says who goes first."""

from __future__ import annotations

from abc import ABC, abstractmethod


class SpendingPolicyBase(ABC):
    """How many points a request should cost; nobody reads them."""

    @abstractmethod
    def get_points(self, protocol: str, *args: object, **kwargs: object) -> float:
        """For one request."""


class NoSpendingPolicy(SpendingPolicyBase):
    """Nothing."""

    def get_points(self, protocol: str, *args: object, **kwargs: object) -> float:
        return 0.0
