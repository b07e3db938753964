"""The pages: files that ship with the package, read once. No build step, nothing from elsewhere, works offline."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
PATHS = {"/": "chat.html", "/swarm": "swarm.html"}

# What a model says is shown by these pages: were it ever to become markup, it still could neither run nor load.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)


class Page:
    """One file, with a tag by which a browser knows that it has not changed."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        self._headers = {
            "content-type": TYPES[name.rpartition(".")[2]],
            "etag": self._tag,
            "cache-control": "no-cache",
            "content-security-policy": CONTENT_POLICY,
        }

    async def answer(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def load_pages() -> dict[str, Page]:
    """Path -> page."""
    folder = files("petals.gateway") / "static"
    names = sorted(each.name for each in folder.iterdir() if each.name.rpartition(".")[2] in TYPES)
    pages = {name: Page(name, (folder / name).read_bytes()) for name in names}
    return {path: pages[name] for path, name in PATHS.items()} | {
        f"/static/{name}": page for name, page in pages.items()
    }
