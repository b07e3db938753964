"""Families that `petals.models` of Petals had modules for; `petals.models` finds them here."""
