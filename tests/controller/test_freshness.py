"""A watch that is dead is told from one where nothing happens."""

from kubetune_operator.freshness import Watched


def _body(uid: str, version: int) -> dict[str, dict[str, str]]:
    return {"metadata": {"uid": uid, "resourceVersion": str(version)}}


def test_a_watch_that_told_everything_is_fresh() -> None:
    watched = Watched("Pod")
    watched.note(None, _body("a", 5))
    assert not watched.compare([_body("a", 5)])
    assert not watched.compare([_body("a", 5)])


def test_a_change_that_is_still_on_its_way_is_no_reason_to_worry() -> None:
    watched = Watched("Pod")
    watched.note(None, _body("a", 5))
    assert not watched.compare([_body("a", 6)])
    watched.note("MODIFIED", _body("a", 6))
    assert not watched.compare([_body("a", 7)])


def test_a_change_that_is_not_told_for_a_whole_interval_makes_the_watch_stale() -> None:
    watched = Watched("Pod")
    watched.note(None, _body("a", 5))
    assert not watched.compare([_body("a", 6)])
    assert watched.compare([_body("a", 6)])
    assert watched.compare([_body("a", 9)])
    watched.note("MODIFIED", _body("a", 9))
    assert not watched.compare([_body("a", 9)])


def test_an_object_that_was_never_told_makes_the_watch_stale_and_a_deleted_one_does_not() -> None:
    watched = Watched("Pod")
    watched.note("ADDED", _body("a", 5))
    watched.note("DELETED", _body("a", 6))
    assert not watched.compare([])
    assert not watched.compare([_body("b", 7)])
    assert watched.compare([_body("b", 7)])
