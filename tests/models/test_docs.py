"""docs/models.md says what the tests prove, no more and no less."""

from __future__ import annotations

from petals.models.families import families
from tests.models.table import DOCUMENT, with_table
from tests.models.tiny import CASES


def test_the_table_of_families_is_fresh() -> None:
    document = DOCUMENT.read_text()
    assert document == with_table(document), "run: python -m tests.models.table"


def test_every_family_called_verified_has_a_case() -> None:
    assert {family.model_type for family in families() if family.verified} == {case.model_type for case in CASES}
