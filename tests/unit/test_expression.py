"""What an expression means, and where the message points if it means nothing."""

import pytest

from dicomnode.core.region import Limit, Region, Support
from dicomnode.errors import ExpressionError
from dicomnode.mining import FIELDS, FUNCTIONS, parse, words
from dicomnode.mining.tree import And, Filled, Not, Number, Or, Span


def at(height_mm: float) -> Limit:
    return Limit(Support.LANDMARK, height_mm, 9.0)


REGIONS = (
    Region("liver", "10200004", "Liver", at(92.8), at(260.5)),
    Region("lumbar spine", "122496007", "Lumbar spine", at(13.0), at(169.2)),
    Region("head", "69536005", "Head", at(573.4), Limit(Support.UNSUPPORTED)),
)
TABLES = {"5" * 64: REGIONS}
LIVER = Span(92_800, 260_500, 1)


def asked(text):
    return parse(text, REGIONS, TABLES).node


def test_and_binds_closer_than_or_and_not_closest():
    a, b, c = (Number("slices", "=", n) for n in (1, 2, 3))
    assert asked("slices = 1 or slices = 2 and not slices = 3") == Or((a, And((b, Not(c)))))
    assert asked("(slices = 1 OR slices = 2) AND slices = 3") == And((Or((a, b)), c))
    assert asked("not not slices = 1") == a


def test_a_share_is_a_whole_number_of_micrometres():
    # 0.9 of 167,700 micrometres is 150,930 of them, and of 150,931 there is one more.
    (node,) = asked("covers(liver, 0.9)").by_bundle
    assert node == ("5" * 64, Span(92_800, 260_500, 150_930))
    assert asked("covers(liver, 0.900001)").by_bundle[0][1].need_um == 150_931
    assert asked("covers(liver)") == asked("covers(liver, 0.5)")
    assert asked("covers(liver, 0.0000001)").by_bundle[0][1].need_um == 1


def test_regions_go_by_name_or_code():
    assert asked("overlaps(liver)") == Filled(by_bundle=(("5" * 64, LIVER),))
    assert asked("overlaps(10200004)") == asked('overlaps("Liver")') == asked("overlaps(LIVER)")
    assert asked("overlaps(lumbar_spine)") == asked("overlaps('lumbar spine')")


def test_heights_need_no_bundle():
    assert parse("height(0, 100.5)", (), {}).node == Filled(span=Span(0, 100_500, 100_500))


@pytest.mark.parametrize("text", ["state = open", "slices = 3 or reason = tilt"])
def test_who_names_the_state_looks_at_every_series(text):
    assert parse(text, REGIONS, TABLES).every_series
    assert not parse("not slices = 3", REGIONS, TABLES).every_series


# A caret under each character that the message is to point at.
@pytest.mark.parametrize(
    ("text", "caret", "message"),
    [
        ("covers(livr, 0.9)", "       ^", "no region 'livr': did you mean liver?"),
        ("covers(lumbar, 0.9)", "       ^", "did you mean lumbar_spine?"),
        ("covers(head, 0.9)", "       ^", "head has no known upper end"),
        ("covers(liver, 1.1)", "              ^", "expected a share above 0, to 1"),
        ("covers(liver, 0)", "              ^", "expected a share above 0, to 1"),
        ("covers(liver, much)", "              ^", "expected a number"),
        ("covers(liver, 1, 2)", "                 ^", "too much for covers(REGION, FRACTION)"),
        ("slices > 1 and covers()", "               ^", "too little for covers(REGION, FRACTION)"),
        ("covers(liver, of=1)", "              ^", "takes no 'of'"),
        ("cover(liver, 1)", "^", "no function 'cover': did you mean covers?"),
        ("slices(3)", "^", "slices is a field"),
        ("covers = 3", "^", "covers is a function: covers(REGION, FRACTION)"),
        ("slics > 3", "^", "no field 'slics': did you mean slices?"),
        ("", "^", "expected a field"),
        ("slices", "      ^", "expected a comparison"),
        ("liver", "     ^", "did you mean overlaps(liver)?"),
        ("slices >", "        ^", "expected a value, found the end"),
        ("slices > 3 and", "              ^", "expected a field"),
        ("slices > 3 4", "           ^", "expected 'and', 'or' or the end, found '4'"),
        ("(slices > 3", "           ^", "expected ')', found the end"),
        ("slices > 3)", "          ^", "found ')'"),
        ("slices > 3; drop", "          ^", "found ';'"),
        ("modality = 'CT", "           ^", "this quote is not closed"),
        ("modality > CT", "         ^", "modality is a text, without an order: = != in"),
        ("slices ~ 3", "       ^", "slices is a whole number: ~ looks within texts"),
        ("slices = 3.5", "         ^", "slices is a whole number"),
        ("slices = many", "         ^", "slices is a whole number"),
        ("spacing = 2.50001", "          ^", "three decimals"),
        ("state = opn", "        ^", "no state 'opn': did you mean open?"),
        ("flag in (gap, gp)", "              ^", "no flag 'gp': did you mean gap?"),
        ("reason = why", "         ^", "no reason 'why': there are not_ct_image"),
        ("study_date = 2024-02-30", "             ^", "no day '2024-02-30'"),
        ("study_date = 9999-12-31", "             ^", "no day '9999-12-31'"),
        ("arrived > 3", "          ^", "arrived is a date: 2024-05-17"),
        ("height(100, 100)", "            ^", "expected a height above the first"),
        ("height(0, 99999999999)", "          ^", "no body is that high"),
        ("prior(90d, 3)", "           ^", "too much for prior(within=90d)"),
        ("prior(within=90)", "             ^", "expected days, weeks or years"),
        ("bundle = '55'", "         ^", "a digest is 8 or more"),
        ("modality = 'C\tT'", "             ^", "a character that no attribute has"),
        ("modality ~ ''", "           ^", "every text has an empty one within"),
        ("slices = é", "         ^", "expected a value, found 'é'"),
        ("not (" * 20 + "(", " " * 100 + "^", "parentheses within each other, more than 20"),
    ],
)
def test_the_message_points_at_the_character(text, caret, message):
    with pytest.raises(ExpressionError) as caught:
        asked(text)
    assert message in caught.value.message
    assert caught.value.position == len(caret) - 1
    lines = str(caught.value).splitlines()
    # What stands above the caret is the character, in long texts as well.
    at = lines[-1].index("^")
    pointed_at = text[len(caret) - 1 : len(caret)]
    shown = pointed_at if pointed_at.isascii() and pointed_at.isprintable() else "?"
    assert lines[-2][at : at + 1] == (shown if pointed_at else "")


def test_of_several_lines_the_one_is_shown():
    with pytest.raises(ExpressionError) as caught:
        asked("slices > 3\nand slics > 3")
    assert str(caught.value).splitlines()[1:] == ["  line 2: and slics > 3", "              ^"]


def test_a_long_text_is_shown_around_the_place():
    text = "slices = 1 or " * 40 + "slics = 1" + " or slices = 1" * 40
    with pytest.raises(ExpressionError) as caught:
        asked(text)
    above, caret = str(caught.value).splitlines()[1:]
    assert above[caret.index("^") :].startswith("slics = 1 or")
    assert len(above) < 130


def test_a_text_too_long_is_refused():
    with pytest.raises(ExpressionError, match="longer than 4000 characters"):
        asked("slices = 1 or " * 400)


def test_without_regions_none_can_be_named():
    with pytest.raises(ExpressionError, match=r"has no regions: height\(FROM, TO\) needs none"):
        parse("covers(liver, 0.9)", (), {})


def test_every_word_can_be_completed():
    found = words(REGIONS)
    assert set(found) == {f.usage for f in FUNCTIONS.values()} | set(FIELDS) | {
        "liver",
        "lumbar_spine",
        "head",
    }
    assert all(found.values())
