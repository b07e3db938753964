"""An answer that a signal cuts off: the exit code says so, and so does the JSON."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from subprocess import PIPE

import pytest
import trio

from tests.cli.test_commands import ENVIRONMENT, ROOT
from tests.swarm.conftest import Swarm, all_leases_returned

COMMAND = [sys.executable, "-m", "petals.cli.main", "peer", "--generate", "A cat sat on", "--max_new_tokens", "2000"]


@pytest.mark.swarm
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
async def test_half_an_answer_is_told_as_such(
    make_swarm: Callable[..., Swarm], sign: signal.Signals, nursery: trio.Nursery
) -> None:
    server = await make_swarm().add(range(30))
    outputs: dict[str, tuple[int, str]] = {}

    async def ask(*flags: str) -> None:
        words = [*COMMAND, "--initial_peers", *server.addrs, *flags]
        run = partial(trio.run_process, words, cwd=ROOT, env=ENVIRONMENT, check=False, stdout=PIPE, stderr=PIPE)
        process: trio.Process = await nursery.start(run)
        begun = server.ledger.describe()["given"]
        with trio.fail_after(60):
            while server.ledger.describe()["given"] < begun + 30 * 12:  # noqa: ASYNC110
                await trio.sleep(0.001)  # a poll of the state waited for: four tokens of prompt, a few more
        process.send_signal(sign)
        said = b""
        assert process.stdout is not None
        while piece := await process.stdout.receive_some():
            said += piece
        outputs[" ".join(flags)] = await process.wait(), said.decode()

    await ask()
    await all_leases_returned(server)
    await ask("--json")
    await all_leases_returned(server)
    code, text = outputs[""]
    assert code == 128 + sign
    assert text.startswith("A cat sat on")
    code, text = outputs["--json"]
    assert code == 128 + sign
    told = json.loads(text)
    assert told["finish_reason"] == "cancelled"
    assert 0 < len(told["token_ids"]) < 2000
    assert told["text"]
    nursery.cancel_scope.cancel()
