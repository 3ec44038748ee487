"""Which written answers count as the true one."""

from epmq_deploy.runtime.evaluation.text_scoring import normalised


def test_case_and_spaces_do_not_count() -> None:
    assert normalised("  Not\n Acceptable ") == normalised("not acceptable")
    assert normalised("acceptable") != normalised("un acceptable")
