"""Drafts: what followed the same tokens before, as long as it pays."""

from hymba.inference.speculation import NGRAM, Drafter


def test_a_draft_is_what_followed_the_last_time() -> None:
    ids = [1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 1, 2, 3]
    drafter = Drafter(ids)
    assert drafter.draft(ids, 2, 1.2) == [6, 7]
    assert drafter.draft(ids, 99, 1.2) == [6, 7, 8, 1, 2, 3]
    assert drafter.draft([*ids, 4], 9, 1.2) == [5, 9, 1, 2, 3, 6, 7, 8, 1]
    assert drafter.draft([*ids, 4, 4], 9, 1.2) == []


def test_short_texts_have_no_drafts() -> None:
    for length in range(NGRAM + 2):
        assert Drafter([7] * length).draft([7] * length, 0, 1.2) == []
        assert len(Drafter([7] * length).draft([7] * length, 5, 1.2)) == max(0, length - NGRAM)


def test_drafts_that_fail_rest_and_come_back() -> None:
    ids, drafter = [1, 2, 3, 4] * 3, Drafter([1, 2, 3, 4] * 3)
    made = []
    for _ in range(200):
        draft = drafter.draft(ids, 4, 1.5)
        made.append(bool(draft))
        if draft:
            drafter.learn(0)
    assert made[0]
    assert 5 < sum(made) < 30
    assert any(made[100:])


def test_drafts_that_succeed_never_rest() -> None:
    ids, drafter = [1, 2, 3, 4] * 3, Drafter([1, 2, 3, 4] * 3)
    for _ in range(100):
        assert drafter.draft(ids, 4, 2.0)
        drafter.learn(4)
