"""What had not been attacked before: factors, complaints as a weapon, what `ps` shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from petals.cli.base.file_arguments import exposed, token_of
from petals.cli.main import parse
from petals.models.blocks.adapters import Lora, LowRank
from petals.models.blocks.block import BlockSpan
from petals.peer.base.identity import Identity, create_identity, verify
from petals.peer.client.audit.verdicts import DOUBLED_AT_MOST, Trust
from petals.peer.membership.complaints import MAX_KEPT, MAX_OF_ACCUSED, MAX_OF_ACCUSER, ComplaintBook
from petals.protocols.evidence import Complaint, SignedAnswer, Statement, sign_complaint
from tests.models.conftest import Tiny, make_tiny  # noqa: F401
from tests.models.tiny import CASES

NOW = 1e9


def poisoned(span: BlockSpan, value: float, rank: int = 2) -> Lora:
    """A client's own factors, full of one value, on every linear layer."""
    layers = {
        (block, path): LowRank(torch.full((rank, inner), value), torch.full((outer, rank), value), 1.0)
        for block in span.blocks
        for path, (inner, outer) in span.linear_features(block).items()
    }
    return Lora("poison", layers)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_poisoned_factors_harm_nobody_else_in_the_pass(make_tiny: Any, family: str, value: float) -> None:  # noqa: F811
    """An honest session's answer beside one with NaN in every update is the one that it has alone."""
    tiny: Tiny = make_tiny(next(case for case in CASES if case.model_type == family))
    span = tiny.whole
    had_joint_path = span._joint is not None
    if not had_joint_path:
        span.find_joint_path()
    honest = torch.randn(1, 1, span.hidden_size, generator=torch.Generator().manual_seed(1))

    def caches() -> list[Any]:
        made = [span.new_cache(span.blocks, 1, 8) for _ in range(3)]
        for cache in made:
            span.step(torch.ones(1, 3, span.hidden_size), cache)
        return made

    alone = span.step(honest, caches()[0])
    plain, harmed, adapted = caches()
    lora = poisoned(span, value)
    outputs = span.step_together([honest, honest, honest], [plain, harmed, adapted], adapters=[None, lora, None])
    torch.testing.assert_close(outputs[0], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[2], alone, rtol=1e-4, atol=1e-4)
    assert outputs[0].isfinite().all()
    assert span.step(honest, plain).isfinite().all()
    if not had_joint_path:
        span.drop_joint_path()


def accusation(accuser: Identity, accused: Identity, now: float = NOW) -> bytes:
    """A valid complaint about an answer that the accused has really signed."""

    def answer(peer: Identity, output: bytes) -> SignedAnswer:
        said = Statement(
            session_id=bytes(16), step_id=1, model_digest="ab" * 32, blocks=range(4), adapter="", dtype="float32",
            quant_type="none", inputs=bytes(32), output=output,
        )  # fmt: skip
        return SignedAnswer(
            peer_id=peer.peer_id, public_key=peer.public_key, statement=said, signature=peer.sign(said.to_bytes())
        )

    complaint = Complaint(
        accuser=accuser.peer_id, answer=answer(accused, bytes(32)), others=(), error=1.0, tolerance=1e-4,
        issued_at=now, expires_at=now + 3600,
    )  # fmt: skip
    return sign_complaint(complaint, accuser.sign, accuser.public_key)


async def test_what_a_group_of_false_auditors_can_do() -> None:
    """With any number of names: audits of one server become eight times as frequent, and that is all."""
    book = ComplaintBook(verify, lambda: NOW)
    victim, *others = (create_identity() for _ in range(9))
    true = [accusation(other, create_identity()) for other in others]
    assert await book.hear(true) == 0
    trust = Trust(book.accusers)
    assert trust.rate(0.01, victim.peer_id) == 0.01
    rates = []
    for _ in range(64):
        assert await book.hear([accusation(create_identity(), victim)]) == 0
        rates.append(trust.rate(0.01, victim.peer_id))
    assert rates[:3] == [0.02, 0.04, 0.08]
    assert set(rates[3:]) == {0.01 * 2**DOUBLED_AT_MOST}
    assert book.accusers(victim.peer_id) == MAX_OF_ACCUSED
    assert len(book._kept) == len(true) + MAX_OF_ACCUSED, "what others said was pushed out"


async def test_how_many_names_push_out_all_complaints() -> None:
    """Who has as many servers' signatures as that, and accusers for them, empties the book: it is no proof anyhow."""
    book = ComplaintBook(verify, lambda: NOW)
    true = accusation(create_identity(), create_identity())
    await book.hear([true])
    accused = [create_identity() for _ in range(MAX_KEPT // MAX_OF_ACCUSER)]
    accusers = [create_identity() for _ in range(MAX_OF_ACCUSED)]
    one = accusers[0]
    for each in accused:
        await book.hear([accusation(one, each)])
    assert len([key for key in book._kept if key[0] == one.peer_id]) == MAX_OF_ACCUSER
    assert any(data == true for _, data in book._kept.values()), "one accuser has pushed it out"
    names = 0
    while any(data == true for _, data in book._kept.values()):
        names += 1
        fresh = create_identity()
        for each in accused[:MAX_OF_ACCUSER] if names % 4 else accused[-MAX_OF_ACCUSER:]:
            await book.hear([accusation(fresh, each, NOW + names * 1e-3)])
        if names > 40:
            break
    assert names > 3


def test_what_ps_shows(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert exposed(["peer", "--token", "hf_x", "--serve"]) == ["--token"]
    assert exposed(["peer", "--token=hf_x", "--invitation", "@file"]) == ["--token"]
    assert exposed(["status", "--api_key", "petals-x"]) == ["--api_key"]
    assert exposed(["peer", "--token=@file", "--model", "--token"]) == ["--token"]
    parse(["peer", "--token", "hf_secret", "--generate", "x"])
    said = capsys.readouterr().err
    assert "PETALS_TOKEN" in said
    assert "hf_secret" not in said
    (tmp_path / "token").write_text("hf_secret\n")
    assert token_of(f"@{tmp_path / 'token'}") == "hf_secret"
