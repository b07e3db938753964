"""Who gave how much to whom, as this peer saw it; and what that is worth when it is crowded. Pure but for one file.

Three rules:

1. What this peer gave and took it knows at first hand. That needs nobody's signature and can not be forged.
2. What others say a peer gave them counts a quarter, and only as far as this peer is in *their* debt: a stranger's word
   weighs nothing, and all that one peer says together weighs no more than it gave here itself. One hop, no further.
3. Nobody falls below a stranger. So a new name wins nothing over a bad one, and newcomers always have their share.

Half of everything is forgotten every day. docs/contribution.md says what this stops and what it does not.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from petals.protocols.errors import UserError
from petals.protocols.receipts import (
    MAX_RECEIPT_BYTES,
    MAX_REFERENCES,
    RECEIPT_ID_BYTES,
    ReceiptError,
    Verify,
    Work,
    client_of,
    open_receipt,
)
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

HALF_LIFE_S = 24 * 3600.0
MAX_PEERS = 4096
"""Accounts; those with the least work in them are forgotten first."""
MAX_FILE_BYTES = 32 << 20

MOST = 8.0
"""The weight of a peer that only gives; a stranger's is 1."""
NEWCOMER = 20_000.0
"""Block-tokens that a peer must have given for half of the most, though it took nothing: an answer of 700 tokens from a
model of 30 blocks. Small presents buy little."""
REFERENCE_WORTH = 0.25
SHOWN = 50
"""Peers in a description."""
WEIGHT_S = 5.0
"""How long a weight is used before it is computed again."""


def nobody_counts(peer_id: PeerId, amount: int) -> None:
    """In the place of `Ledger.gave` and `Ledger.took` where no ledger is kept."""


def weight(given_us: float, given_them: float) -> float:
    """A peer's share of the compute thread, between 1 and `MOST`; a pair that gives as much as it takes has about half.

    Args:
        given_us: block-tokens that the peer gave to us of late; given_them: that we gave to it.
    """
    return 1 + (MOST - 1) * given_us / (given_us + given_them + NEWCOMER)


@dataclass(slots=True)
class Account:
    """One other peer, in block-tokens. `recent_*` are as of `at`, Unix seconds."""

    given: int = 0
    """By us, to it."""
    taken: int = 0
    """By us, from it."""
    signed_given: int = 0
    """What of it receipts cover."""
    signed_taken: int = 0
    unsigned_steps: int = 0
    recent_given: float = 0.0
    recent_taken: float = 0.0
    at: float = 0.0
    receipt: bytes = b""
    """The newest one that it signed as our client."""

    def age(self, now: float) -> None:
        """Forget what is to be forgotten by `now`."""
        if now > self.at:
            left = 0.5 ** ((now - self.at) / HALF_LIFE_S)
            self.recent_given *= left
            self.recent_taken *= left
            self.at = now


ACCOUNT_FIELDS = tuple(each.name for each in fields(Account))


@dataclass(frozen=True, slots=True)
class _Reference:
    amount: float
    at: float


def open_references(
    peer_id: PeerId, receipts: Sequence[bytes], *, now: float, verify: Verify
) -> tuple[list[Work], int]:
    """What `peer_id` did for others, as receipts that it shows prove; and how many of them are not believed."""
    works, refused = [], 0
    for data in receipts:
        try:
            work = open_receipt(data, now=now, verify=verify)
            if work.server != peer_id:
                raise ReceiptError("receipt: somebody else's")
        except ReceiptError as error:
            log.info("a reference of …%s is dropped: %s", peer_id[-6:], error)
            refused += 1
        else:
            works.append(work)
    return works, refused


class Ledger:
    """All accounts of one peer.

    Args:
        peer_id: our own; work for ourselves is not counted.
        now: Unix seconds.
    """

    def __init__(self, peer_id: PeerId, now: Callable[[], float]) -> None:
        self.peer_id = peer_id
        self.now = now
        self.accounts: dict[PeerId, Account] = {}
        self.given = self.taken = 0
        """Block-tokens to and from all peers, those that are forgotten included."""
        self.receipts = 0
        """Signed by both, on either side, since the start."""
        self.rejected = 0
        """Receipts and references that did not pass a check, since the start."""
        self.changed = False
        self._unsigned: dict[PeerId, tuple[float, float]] = {}
        """When the first and the last work was given that no receipt covers."""
        self._references: dict[PeerId, dict[PeerId, _Reference]] = {}
        """For whom -> by whom. Who was heard last stands last."""
        self._said_by: dict[PeerId, dict[PeerId, float]] = {}
        """By whom -> for whom -> how much."""
        self._weights: dict[PeerId, tuple[float, float]] = {}
        """Peer -> its weight, and until when it is used."""

    # -- first hand ------------------------------------------------------------------------------------------------

    def gave(self, peer_id: PeerId, amount: int) -> None:
        """A step for `peer_id` is answered."""
        if peer_id == self.peer_id:
            return
        account, now = self._account(peer_id), self.now()
        account.given += amount
        account.recent_given += amount
        account.unsigned_steps += 1
        self.given += amount
        self._unsigned[peer_id] = (self._unsigned.get(peer_id, (now, now))[0], now)

    def took(self, peer_id: PeerId, amount: int) -> None:
        """`peer_id` has answered a step of ours."""
        if peer_id == self.peer_id:
            return
        account = self._account(peer_id)
        account.taken += amount
        account.recent_taken += amount
        self.taken += amount

    def _account(self, peer_id: PeerId) -> Account:
        self.changed = True
        account = self.accounts.get(peer_id)
        if account is None:
            if len(self.accounts) >= MAX_PEERS:
                self._make_room()
            account = self.accounts[peer_id] = Account(at=self.now())
        account.age(self.now())
        return account

    def _make_room(self) -> None:
        now = self.now()
        for account in self.accounts.values():
            account.age(now)
        by_work = sorted(self.accounts, key=lambda p: self.accounts[p].recent_given + self.accounts[p].recent_taken)
        for peer_id in by_work[: MAX_PEERS // 8]:
            del self.accounts[peer_id]
            self._unsigned.pop(peer_id, None)

    def balance(self, peer_id: PeerId) -> float:
        """Recent block-tokens that `peer_id` gave us more than we gave it; negative: it owes us."""
        account = self.accounts.get(peer_id)
        if account is None:
            return 0.0
        account.age(self.now())
        return account.recent_taken - account.recent_given

    # -- priority --------------------------------------------------------------------------------------------------

    def weight(self, peer_id: PeerId) -> float:
        """The share of the compute thread that `peer_id` has earned; looked up, and computed every few seconds."""
        now = self.now()
        known = self._weights.get(peer_id)
        if known is not None and now < known[1] <= now + WEIGHT_S:
            return known[0]
        if len(self._weights) >= MAX_PEERS:
            self._weights.clear()
        account = self.accounts.get(peer_id, Account(at=now))
        account.age(now)
        earned = weight(account.recent_taken + REFERENCE_WORTH * self.vouched(peer_id), account.recent_given)
        self._weights[peer_id] = (earned, now + WEIGHT_S)
        return earned

    def vouched(self, peer_id: PeerId) -> float:
        """What others say `peer_id` gave them, as far as we are in their debt."""
        now, total = self.now(), 0.0
        for referee, said in self._references.get(peer_id, {}).items():
            worth = max(0.0, self.balance(referee))
            share = min(1.0, worth / sum(self._said_by[referee].values())) if worth else 0.0
            total += share * said.amount * 0.5 ** (max(0.0, now - said.at) / HALF_LIFE_S)
        return total

    def worth_reading(self, receipts: Sequence[bytes]) -> list[bytes]:
        """Those of somebody who gave us something: others weigh nothing, and are not even verified."""
        worth = []
        for data in receipts[:MAX_REFERENCES]:
            try:
                if self.balance(client_of(data[:MAX_RECEIPT_BYTES])) > 0:
                    worth.append(data)
            except ReceiptError:
                self.rejected += 1
        return worth

    def hear(self, peer_id: PeerId, works: Sequence[Work]) -> None:
        """`peer_id` shows what it did for others (`open_references`): in place of all that it showed before."""
        heard: dict[PeerId, _Reference] = {}
        now = self.now()
        for work in works:
            age_s = max(0.0, now - work.ended_at)
            heard[work.client] = _Reference(work.recent_block_tokens * 0.5 ** (age_s / HALF_LIFE_S), now)
        self._forget_references(peer_id)
        if heard:
            while len(self._references) >= MAX_PEERS:
                self._forget_references(next(iter(self._references)))
            self._references[peer_id] = heard
            for referee, said in heard.items():
                self._said_by.setdefault(referee, {})[peer_id] = said.amount
        self._weights.pop(peer_id, None)

    def _forget_references(self, peer_id: PeerId) -> None:
        for referee in self._references.pop(peer_id, {}):
            said = self._said_by[referee]
            del said[peer_id]
            if not said:
                del self._said_by[referee]

    # -- receipts --------------------------------------------------------------------------------------------------

    def due(self, *, quiet_s: float, at_most_s: float) -> list[PeerId]:
        """Who should sign for work: it has paused for `quiet_s`, or goes on for `at_most_s`."""
        now = self.now()
        return [
            peer_id
            for peer_id, (first, last) in self._unsigned.items()
            if now - last >= quiet_s or now - first >= at_most_s
        ]

    @property
    def unsigned(self) -> Sequence[PeerId]:
        """To whom work was given that no receipt covers."""
        return tuple(self._unsigned)

    def work_for(self, client: PeerId, model_digest: str, blocks: range) -> Work | None:
        """What we did for `client` since its last receipt; None: nothing."""
        account = self.accounts.get(client)
        if account is None or client not in self._unsigned or account.given <= account.signed_given:
            return None
        now = self.now()
        account.age(now)
        amount = account.given - account.signed_given
        return Work(
            server=self.peer_id,
            client=client,
            receipt_id=secrets.token_bytes(RECEIPT_ID_BYTES),
            model_digest=model_digest,
            blocks=blocks,
            steps=account.unsigned_steps,
            block_tokens=amount,
            recent_block_tokens=max(amount, int(account.recent_given)),
            started_at=min(now, self._unsigned[client][0]),
            ended_at=now,
        )

    def would_sign(self, work: Work) -> Work:
        """`work`, or as much of it as we count ourselves."""
        account = self.accounts.get(work.server, Account(at=self.now()))
        account.age(self.now())
        amount = min(work.block_tokens, account.taken - account.signed_taken)
        # Two clocks forget at moments that are a little apart.
        recent = min(work.recent_block_tokens, max(amount, int(1.001 * account.recent_taken) + 1))
        return replace(work, block_tokens=amount, recent_block_tokens=recent)

    def signed_as_client(self, work: Work) -> None:
        """We have signed for work of `work.server`."""
        self._account(work.server).signed_taken += work.block_tokens
        self.receipts += 1

    def signed_as_server(self, work: Work, receipt: bytes) -> None:
        """Our client has signed for our work."""
        account = self._account(work.client)
        account.signed_given += work.block_tokens
        account.unsigned_steps = 0
        account.receipt = receipt
        self.receipts += 1
        if account.signed_given >= account.given:
            self._unsigned.pop(work.client, None)
        else:
            self._unsigned[work.client] = (self.now(), self.now())

    def write_off(self, client: PeerId) -> None:
        """Ask no more for what `client` will not sign; we know it at first hand all the same."""
        self._unsigned.pop(client, None)
        if client in self.accounts:
            account = self.accounts[client]
            account.signed_given, account.unsigned_steps = account.given, 0
            self.changed = True

    def references(self, reader: PeerId) -> list[bytes]:
        """What others have signed for us, the most work first, for `reader` to weigh."""
        now = self.now()
        signed = []
        for peer_id, account in self.accounts.items():
            if account.receipt and peer_id != reader:
                account.age(now)
                signed.append((account.recent_given, account.receipt))
        return [receipt for _, receipt in sorted(signed, reverse=True)[:MAX_REFERENCES]]

    # -- for people ------------------------------------------------------------------------------------------------

    def describe(self, most: int = SHOWN) -> dict[str, Any]:
        """As JSON: totals, and the peers with the most recent work."""
        now = self.now()
        for account in self.accounts.values():
            account.age(now)
        by_work = sorted(self.accounts.items(), key=lambda item: -item[1].recent_given - item[1].recent_taken)
        return {
            "given": self.given,
            "taken": self.taken,
            "receipts": self.receipts,
            "rejected": self.rejected,
            "peers": [
                {
                    "peer_id": peer_id,
                    "given": account.given,
                    "taken": account.taken,
                    "signed_given": account.signed_given,
                    "signed_taken": account.signed_taken,
                    "recent_given": round(account.recent_given),
                    "recent_taken": round(account.recent_taken),
                    "balance": round(account.recent_taken - account.recent_given),
                    "weight": round(self.weight(peer_id), 3),
                }
                for peer_id, account in by_work[:most]
            ],
        }

    # -- at rest ---------------------------------------------------------------------------------------------------

    def dump(self) -> str:
        """Everything that is kept, as JSON; may be called in a thread. References are heard anew."""
        accounts = {}
        for peer_id, account in list(self.accounts.items()):
            values = {name: getattr(account, name) for name in ACCOUNT_FIELDS}
            accounts[peer_id] = values | {"receipt": base64.b64encode(account.receipt).decode()}
        return json.dumps({"version": 1, "given": self.given, "taken": self.taken, "accounts": accounts})

    def load(self, text: str) -> None:
        """Take up what `dump` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            told = json.loads(text)
            if told["version"] != 1 or len(told["accounts"]) > MAX_PEERS:
                raise ValueError("another version, or too many accounts")
            accounts = {PeerId(str(peer_id)): _account(told) for peer_id, told in told["accounts"].items()}
            self.given, self.taken = _count(told["given"]), _count(told["taken"])
        except (KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise ValueError(f"not a ledger: {error}") from None
        now = self.now()
        self.accounts = accounts
        self._unsigned = {peer: (now, now) for peer, each in accounts.items() if each.given > each.signed_given}


def _account(told: Any) -> Account:
    values = {name: told[name] for name in ACCOUNT_FIELDS}
    for name in ("given", "taken", "signed_given", "signed_taken", "unsigned_steps"):
        values[name] = _count(values[name])
    for name in ("recent_given", "recent_taken", "at"):
        values[name] = float(values[name])
        if not 0 <= values[name] < 2.0**63:
            raise ValueError(f"{name} is {values[name]}")
    values["receipt"] = base64.b64decode(values["receipt"], validate=True)[:MAX_RECEIPT_BYTES]
    return Account(**values)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value


def ledger_path(identity: Path) -> Path:
    """Where the ledger of the peer with this key file is kept."""
    return identity.with_name(f"{identity.name}.ledger")


def read_ledger(path: Path, ledger: Ledger) -> bool:
    """Fill `ledger` from a file; False: there is none.

    Raises:
        UserError: it can not be read, or holds something else.
    """
    try:
        if not path.exists():
            return False
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("too large")
        ledger.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can not read the ledger {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} holds no ledger ({error}); move it away and a new one is begun") from None
    return True


def write_ledger(path: Path, text: str) -> None:
    """Write whole or not at all; only the owner may read who asked whom.

    Raises:
        OSError: the disk is full, or the like.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
