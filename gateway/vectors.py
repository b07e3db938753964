"""Around the model without generating: /v1/embeddings, /tokenize, /detokenize, /version."""

from __future__ import annotations

import base64
import importlib.metadata
import struct
from functools import partial
from typing import Any

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from petals.gateway.asgi import unless_gone
from petals.gateway.chat_requests import read_continues, read_messages, template_arguments
from petals.gateway.desk import NO_STORE, Desk, Handler, asker_of
from petals.gateway.errors import as_api_error
from petals.gateway.fields import Fields
from petals.gateway.request_parser import read_prompts
from petals.gateway.tools import read_tools
from petals.models.source.context_length import longest_context
from petals.peer.client.generation.prompts import Chat, Prompt, tokenise
from petals.peer.client.generation.scoring import Pooling, embed
from petals.peer.node import Peer

MAX_INPUTS = 256
MAX_IDS = 1 << 20
POOLINGS: tuple[Pooling, ...] = ("mean", "last")


def vector_routes(desk: Desk, peer: Peer) -> dict[str, tuple[str, Handler]]:
    """Path -> method and handler."""
    return {
        "/v1/embeddings": ("POST", partial(_embeddings, desk, peer)),
        "/tokenize": ("POST", partial(_tokenize, desk, peer)),
        "/detokenize": ("POST", partial(_detokenize, desk, peer)),
        "/version": ("GET", _version),
    }


async def embed_all(
    desk: Desk, peer: Peer, request: Request, name: str, inputs: tuple[Prompt, ...], pooling: Pooling
) -> tuple[list[list[float]], int]:
    """A vector of each input, and how many tokens they have.

    Raises:
        ApiError. ClientGone: nobody waits for it.
    """
    model = await desk.offers.find(name)

    async def work() -> tuple[list[list[float]], int]:
        vectors, tokens = [], 0
        async with desk.answerer.turn(1, asker_of(request)):
            client = await peer.client(model.argument)
            options = desk.answerer.options_of(model)
            try:
                await client.ready(options)
                for each in inputs:
                    ids, vector = await embed(client, each, options, pooling=pooling)
                    vectors.append(vector.tolist())
                    tokens += len(ids)
            except Exception as error:
                raise as_api_error(error) from error
        return vectors, tokens

    return await unless_gone(request.receive, work)


async def _embeddings(desk: Desk, peer: Peer, request: Request) -> Response:
    fields = Fields(await desk.read(request))
    name, inputs = fields.text("model"), read_prompts(fields, "input", MAX_INPUTS)
    form = fields.take("encoding_format")
    if form not in (None, "float", "base64"):
        fields.refuse("encoding_format", "must be float or base64")
    fields.nothing("dimensions", "is not supported: a vector has as many numbers as the model's hidden states")
    pooling = fields.take("pooling")
    if pooling not in (None, *POOLINGS):
        fields.refuse("pooling", "must be mean or last")
    fields.ignore(("user",))
    fields.finish()
    vectors, tokens = await embed_all(desk, peer, request, name, inputs, pooling or "mean")
    listed = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if form == "base64" else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": listed, "model": name, "usage": usage}, headers=NO_STORE)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def _tokenize(desk: Desk, peer: Peer, request: Request) -> Response:
    """vLLM's: a text or a conversation; llama.cpp's: `content`."""
    fields = Fields(await desk.read(request))
    name = fields.take("model")
    messages = fields.take("messages")
    prompt: Prompt
    if messages is not None:
        inner = Fields({"messages": messages})
        found = read_messages(inner)
        tools = read_tools(fields)
        prompt = Chat(
            found,
            tools=tuple(tool.as_template() for tool in tools.offered),
            arguments=template_arguments(fields),
            continues=read_continues(fields, found),
        )
    else:
        key = "content" if "content" in fields else "prompt"
        prompt = fields.text(key)
    strings = fields.flag("return_token_strs") or fields.flag("with_pieces")
    fields.ignore(("add_special_tokens", "add_special", "parse_special"))
    fields.finish()
    client, tokenizer = await _tokenizer(desk, peer, name)
    try:
        ids = await trio.to_thread.run_sync(tokenise, tokenizer, prompt, client.checkpoint)
    except Exception as error:
        raise as_api_error(error) from error
    limit = longest_context(client.checkpoint.config.get_text_config())
    body: dict[str, Any] = {"count": len(ids), "max_model_len": limit, "tokens": ids}
    if strings:
        body["token_strs"] = tokenizer.convert_ids_to_tokens(ids)
    return JSONResponse(body, headers=NO_STORE)


async def _detokenize(desk: Desk, peer: Peer, request: Request) -> Response:
    fields = Fields(await desk.read(request))
    name, ids = fields.take("model"), fields.take("tokens")
    if not isinstance(ids, list) or len(ids) > MAX_IDS or not all(type(each) is int for each in ids):
        fields.refuse("tokens", "must be a list of token ids")
    fields.finish()
    client, tokenizer = await _tokenizer(desk, peer, name)
    vocabulary = client.checkpoint.config.get_text_config().vocab_size
    if any(not 0 <= each < vocabulary for each in ids):
        fields.refuse("tokens", f"must be from 0 to {vocabulary - 1}")
    text = await trio.to_thread.run_sync(tokenizer.decode, ids)
    return JSONResponse({"prompt": text, "content": text}, headers=NO_STORE)


async def _tokenizer(desk: Desk, peer: Peer, name: object) -> tuple[Any, Any]:
    """Of the named model; without a name, of the first."""
    model = await desk.offers.find(name) if isinstance(name, str) else next(iter(desk.offers.models.values()))
    client = await peer.client(model.argument)
    _, tokenizer = await client.language_model(peer.asking.head_quant)
    return client, tokenizer


async def _version(request: Request) -> Response:
    return JSONResponse({"version": version()}, headers=NO_STORE)


def version() -> str:
    """Of this package."""
    return importlib.metadata.version("petals-libp2p")
