import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.rules import CAMERA_NAME


@pytest.mark.parametrize("name", ["a", "Porch-2", "cam.1_x", "9", "x" * 64])
def test_names_that_are_taken(name: str) -> None:
    assert CAMERA_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "x" * 65, "a b", "a/b", "ä", "a\n", "a\0"])
def test_names_that_are_not(name: str) -> None:
    assert not CAMERA_NAME.fullmatch(name)


@given(st.from_regex(CAMERA_NAME, fullmatch=True))
def test_a_name_is_safe_in_a_path_and_a_url(name: str) -> None:
    assert "/" not in name
    assert name not in (".", "..")
    assert name.isascii()
