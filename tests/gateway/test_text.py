"""Stop strings, however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals.peer.client.generation.text import StopStrings

words = st.text("ab\n", max_size=30)


@given(text=words, stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4), cut=st.integers(1, 7))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text: str, stops: list[str], cut: int) -> None:
    scanner, said = StopStrings(stops), ""
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)] or [""]
    for index, piece in enumerate(pieces):
        said += scanner.add(piece, last=index == len(pieces) - 1)
        assert text.startswith(said)
    # Of several, the first that is complete ends the text: what comes later may already have been needed to know.
    prefixes = (text[: min(n * cut, len(text))] for n in range(1, len(pieces) + 1))
    seen = next((each for each in prefixes if any(stop in each for stop in stops)), None)
    assert scanner.found == (seen is not None)
    assert said == (text if seen is None else seen[: min(seen.find(stop) for stop in stops if stop in seen)])
