import pytest

from tests.unit.claims.claims_at_hand import FakeOrchestrators


@pytest.fixture
def orchestrators() -> FakeOrchestrators:
    return FakeOrchestrators()
