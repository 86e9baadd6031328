import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from deployments.claims.asking import UNREACHABLE, ask_claims
from deployments.errors import QueueFullError, SupersededError

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.rpc.retry._MAX_PAUSE_S", 0.0)


class Claims:
    """Fails with these errors in turn, as Ray passes them on, and answers after."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.num_asked = 0

    async def ask(self) -> str:
        self.num_asked += 1
        if self._errors:
            raise self._errors.pop(0)
        return "answered"


def passed_on(error: Exception) -> Exception:
    return RayTaskError("ask", "Traceback ...", error).as_instanceof_cause()


async def test_claims_is_asked_again_while_its_replica_is_replaced() -> None:
    claims = Claims(ActorDiedError(), passed_on(SupersededError("another")), TimeoutError())
    assert await ask_claims(claims.ask) == "answered"
    assert claims.num_asked == 4


async def test_what_claims_itself_raises_comes_at_once_and_without_where_it_came_from() -> None:
    claims = Claims(passed_on(QueueFullError(3, 7)))
    with pytest.raises(QueueFullError) as raised:
        await ask_claims(claims.ask)
    assert claims.num_asked == 1
    assert not isinstance(raised.value, RayTaskError)
    assert (raised.value.max_queued, raised.value.retry_after_s) == (3, 7)


async def test_claims_that_stays_away_is_given_up() -> None:
    claims = Claims(*[ActorDiedError()] * 100)
    with pytest.raises(UNREACHABLE):
        await ask_claims(claims.ask)
    assert claims.num_asked == 21
