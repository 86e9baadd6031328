from pyramid_serve.reasons import first_line


def test_an_error_is_told_by_the_first_line_of_its_message() -> None:
    assert first_line(ValueError("\n it does not fit\nbecause of ...")) == "it does not fit"


def test_an_error_without_a_message_is_told_by_its_class() -> None:
    assert first_line(TimeoutError()) == "TimeoutError"
