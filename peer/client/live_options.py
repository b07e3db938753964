"""What a model wants of the swarm may change while it is open: `model.config.active_adapter = NAME`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from petals.protocols.errors import UserError

if TYPE_CHECKING:
    from petals.peer.client.model_client import ClientOptions

READ_WHEN_OPENED = frozenset({"head_quant"})
"""Options that hold for good."""


class LiveOptions:
    """The options that a model was opened with, and what its configuration says since: called for the current ones.

    Args:
        options: as of the opening.
        live: names of options that may change; other fields of `options` may not.
    """

    def __init__(self, options: ClientOptions, live: frozenset[str]) -> None:
        self._options = options
        self._live = live
        self._known = {each.name: getattr(options, each.name) for each in fields(options)}
        self._config: Any = None
        self._shown: dict[str, Any] = {}

    def follow(self, config: Any) -> None:
        """From now on attributes of `config` named like options are options."""
        config.active_adapter = self._options.active_adapter
        self._config = config
        self._shown = {name: value for name, value in vars(config).items() if name in self._known}

    def __call__(self) -> ClientOptions:
        """
        Raises:
            UserError: the configuration says something that is only read when a model is opened.
        """
        if self._config is None:
            return self._options
        said = {name: value for name, value in vars(self._config).items() if name in self._known}
        changed = {name: value for name, value in said.items() if name not in self._shown or self._shown[name] != value}
        for name in changed:
            if name not in self._live:
                raise UserError(
                    f"model.config.{name} is read when a model is opened: give {name}= to from_pretrained instead"
                )
        return replace(self._options, **changed) if changed else self._options
