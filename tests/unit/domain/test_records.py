"""The identities of chains."""

import uuid

import pytest

from dispatcher.domain.records import has_mark, new_uid, uid_mark


def test_a_new_identity_is_a_random_uuid():
    made = {new_uid() for _ in range(100)}
    assert len(made) == 100
    assert {uuid.UUID(uid).version for uid in made} == {4}


@pytest.mark.parametrize("name", ["staging", "Zoë's copy", "a" * 500])
def test_the_identities_of_a_copy_are_random_uuids_that_begin_with_its_mark(name):
    mark = uid_mark(name)
    made = {new_uid(mark) for _ in range(100)}
    assert len(made) == 100
    assert {(uuid.UUID(uid).version, uuid.UUID(uid).variant) for uid in made} == {(4, uuid.RFC_4122)}
    assert all(has_mark(uid, mark) for uid in made)
    assert uid_mark(name) == mark and not any(has_mark(uid, uid_mark("another")) for uid in made)


def test_a_chain_without_an_identity_has_no_mark():
    assert not has_mark(None, uid_mark("staging"))
    assert not has_mark(new_uid(), uid_mark("staging"))
