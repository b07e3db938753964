"""Petals' own module paths, so that programs written for it run: `petals.client`, `petals.utils` and others.

`petals/__init__.py` puts this folder behind its own path: `import petals.client` finds `petals/compat/client`. Each
module is a table of names (moved.py); a name warns once where it is used, and says where it is now. What has no
counterpart raises ImportError with the new way. docs/migrating.md lists all of them.
"""
