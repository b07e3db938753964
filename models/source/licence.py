"""What a model's licence is, and whether it lets anybody pass the weights on."""

from __future__ import annotations

import re
from pathlib import Path

REDISTRIBUTABLE = frozenset(
    {
        "apache-2.0",
        "mit",
        "mit-0",
        "isc",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "zlib",
        "unlicense",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cdla-permissive-2.0",
        "openrail",
        "openrail++",
        "creativeml-openrail-m",
        "bigscience-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl-3.0",
        "mpl-2.0",
    }
)
"""Licences, as model cards name them, that permit redistribution by anybody who keeps the licence's text with it. The
open RAIL licences attach conditions on use, which travel with the weights. What is not in here may still be allowed;
that is for whoever passes it on to know."""

_TEXTS = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"Permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    (r"Redistribution and use in source and binary forms", "bsd"),
)
_HEAD_CHARS = 4096


def may_share(licence: str) -> bool:
    """Whether the weights may be passed on for all that this licence's name tells."""
    return licence.lower() in REDISTRIBUTABLE


def find_licence(directory: Path) -> str:
    """The identifier in the model card's front matter, else that of a licence's well-known text; empty: neither."""
    card = re.match(r"---\s*\n(.*?)\n---", _head(directory / "README.md"), re.DOTALL)
    named = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", card[1], re.MULTILINE) if card else None
    if named is not None:
        return named[1].lower()
    for path in sorted(directory.glob("LICENSE*")):
        head = _head(path)
        for text, name in _TEXTS:
            if re.search(text, head):
                return name
    return ""


def _head(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_HEAD_CHARS)
    except OSError:
        return ""
