"""From a data set's labels to a head's class numbers."""

import pytest

from epmq_deploy.data.class_labels import ClassLabels, HeadClasses, class_labels, match_classes
from epmq_deploy.errors import RecipeError

MNLI = ("contradiction", "entailment", "neutral")


def labels(
    values: list[object],
    data_names: list[str] | None = None,
    names: tuple[str, ...] | None = None,
    count: int | None = None,
) -> ClassLabels:
    """Translate labels of rows 0, 1, ..."""
    head = HeadClasses(count if names is None else len(names), names)
    return class_labels(values, range(len(values)), data_names, head, "task 't': x")


def test_classes_are_matched_by_name_whatever_their_order() -> None:
    found = labels([0, 1, 2, 2], ["entailment", "neutral", "contradiction"], MNLI)
    assert found == ClassLabels([1, 2, 0, 0])


@pytest.mark.parametrize("spelling", ["Entailment", "ENTAILMENT", " entailment "])
def test_case_and_spaces_of_names_do_not_matter(spelling: str) -> None:
    assert labels([0], [spelling], MNLI).numbers == [1]


def test_underscores_and_hyphens_are_spaces() -> None:
    assert labels([0, 1], ["annual_crop", "sea-lake"], ("sea lake", "Annual Crop")).numbers == [
        1,
        0,
    ]


def test_names_that_differ_by_case_alone_are_matched_exactly() -> None:
    assert labels([0, 1], ["May", "may"], ("may", "May")).numbers == [1, 0]


def test_a_class_without_samples_shifts_no_other() -> None:
    assert labels([0, 1], ["bird", "dog"], ("bird", "cat", "dog")).numbers == [0, 2]


def test_other_names_are_refused_with_both_lists() -> None:
    with pytest.raises(RecipeError) as error:
        labels([0], ["yes", "no", "entailment"], MNLI)
    for part in ("yes, no, entailment", ", ".join(MNLI), "label_names", "same_as_head"):
        assert part in str(error.value)


def test_labels_may_be_names() -> None:
    assert labels(["neutral", "entailment"], None, MNLI).numbers == [2, 1]
    assert labels(["b", "a"], ["b", "a"], ("a", "b")).numbers == [1, 0]
    with pytest.raises(RecipeError, match="holds 'c', which is none of b, a"):
        labels(["c"], ["b", "a"], ("a", "b"))


def test_names_need_a_head_that_names_its_classes() -> None:
    with pytest.raises(RecipeError, match=r"head has 2 without names; .* as head\.classes"):
        labels(["b", "a"], None, None, 2)


def test_numbers_without_names_are_the_head_s_and_that_is_said() -> None:
    found = labels([2, 0, True], None, MNLI)
    assert found.numbers == [2, 0, 1]
    assert "taken as the head's classes (0 contradiction, 1 entailment" in found.assumption
    assert labels([2, 0], None, None, 3).assumption == ""


def test_a_head_without_names_takes_the_data_s_order_and_says_so() -> None:
    found = labels([1], ["cat", "dog"], None, 2)
    assert found.numbers == [1]
    assert "taken in the data's order (cat, dog)" in found.assumption
    with pytest.raises(RecipeError, match="the data name 2 classes"):
        labels([1], ["cat", "dog"], None, 3)


@pytest.mark.parametrize(
    ("names", "count", "expected", "start"),
    [
        (["0", "2"], 3, [0, 2], 0),
        (["1", "2", "10"], 10, [0, 1, 9], 1),
        (["LABEL_0", "LABEL_1"], 2, [0, 1], 0),
        (["07", "00"], 9, [7, 0], 0),
    ],
)
def test_names_that_are_numbers_are_class_numbers(
    names: list[str], count: int, expected: list[int], start: int
) -> None:
    found, assumption = match_classes(names, HeadClasses(count), "x")
    assert found == expected
    assert assumption.endswith(f"counted from {start}")


def test_numbers_that_may_count_from_0_or_1_are_refused() -> None:
    with pytest.raises(RecipeError, match="from 0 or from 1"):
        match_classes(["1", "2"], HeadClasses(3), "x")
    with pytest.raises(RecipeError, match="not among the head's 3 classes"):
        match_classes(["0", "3"], HeadClasses(3), "x")


def test_names_that_are_numbers_are_names_where_the_head_has_them() -> None:
    digits = tuple(reversed("0123456789"))
    assert match_classes(list("0123"), HeadClasses(10, digits), "x") == ([9, 8, 7, 6], "")


def test_heads_with_equal_names_are_matched_by_place_alone() -> None:
    names = ("crane", "dog", "crane")
    assert labels([0, 2], list(names), names).numbers == [0, 2]
    with pytest.raises(RecipeError, match="two of the head's classes are called 'crane'"):
        labels([0], ["dog", "crane"], names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, -1], "row 1 holds -1, .* without a label"),
        ([0, None], "row 1 holds no label"),
        ([0, 0.5], "row 1 holds 0.5"),
        ([0, float("nan")], "row 1 holds nan"),
        ([0, 3], "row 1 holds label 3, but its head has 3 classes, 0 to 2"),
        ([0, [1]], r"row 1 holds \[1\]"),
        (["neutral", None], "row 1 holds no label where"),
        (["neutral", " "], "row 1 holds ' ' where"),
        ([2, "neutral"], "row 0 holds 2 where"),
    ],
)
def test_labels_that_are_none_are_named_by_row(values: list[object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        labels(values, None, MNLI)


def test_whole_numbers_may_be_stored_as_floats() -> None:
    assert labels([1.0, 2.0], None, None, 3).numbers == [1, 2]


def test_booleans_are_named_where_the_head_names_them() -> None:
    assert labels([True, False], None, ("True", "False")).numbers == [0, 1]
    assert labels([True, False], None, ("no", "yes")).numbers == [1, 0]


def test_numbers_are_names_where_all_the_head_s_names_are_numbers() -> None:
    stars = labels([1, 5, 3], None, ("1", "2", "3", "4", "5"))
    assert stars.numbers == [0, 4, 2]
    assert "taken as the names of the head's classes" in stars.assumption
    # Zero is the name of no class, so these can only be places.
    assert labels([0, 4], None, ("1", "2", "3", "4", "5")).numbers == [0, 4]


def test_numbers_up_to_the_number_of_classes_count_from_1() -> None:
    found = labels([3, 1, 2], None, MNLI)
    assert found.numbers == [2, 0, 1]
    assert "(1 contradiction, 2 entailment, 3 neutral)" in found.assumption
    assert "1 class 0" in labels([1, 2], None, None, 2).assumption
    with pytest.raises(RecipeError, match="row 1 holds label 3"):
        labels([0, 3], None, MNLI)
