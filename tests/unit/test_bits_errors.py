"""How bits are written, and how errors read."""

from __future__ import annotations

import pytest

from qvdit.contract import ACT_BITS, WEIGHT_BITS, Bits, QvditError


@pytest.mark.parametrize("weight", WEIGHT_BITS)
@pytest.mark.parametrize("act", ACT_BITS)
def test_parse_is_the_inverse_of_str(weight, act):
    assert Bits.parse(f"w{weight}a{act}") == Bits(weight, act)
    assert str(Bits(weight, act)) == f"w{weight}a{act}"


@pytest.mark.parametrize("text", ["W4A8", " w4a8", "w4a8\n", "w4A8 "])
def test_case_and_space_around_do_not_matter(text):
    assert Bits.parse(text) == Bits(4, 8)


@pytest.mark.parametrize(
    "text",
    ["", "w4", "a8", "4a8", "w4a8a8", "w5a8", "w1a8", "w16a16", "w4a4", "w4a16", "w-4a8", "w4.0a8", "w4 a8", "int8"],
)
def test_other_bits_are_refused(text):
    with pytest.raises(QvditError) as caught:
        Bits.parse(text)
    assert caught.value.got == f"bits {text!r}"
    assert caught.value.expected == "wXaY with X in 2, 3, 4, 6, 8 and Y in 6, 8"
    assert "\n" not in str(caught.value)


def test_bits_of_absurd_length_are_refused():
    with pytest.raises(QvditError):
        Bits.parse("w" + "9" * 5000 + "a8")


def test_an_error_says_got_expected_and_fix():
    error = QvditError("a cat", "a dog", "feed it")
    assert str(error) == "got a cat; expected a dog; feed it"
    assert (error.got, error.expected, error.fix) == ("a cat", "a dog", "feed it")
