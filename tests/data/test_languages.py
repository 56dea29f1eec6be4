from fiducial.data.languages import language_of


def test_a_text_is_chinese_when_enough_of_its_letters_are():
    assert language_of("怎样用 Python 写程序") == "zh"
    assert language_of("") == language_of("123 ?") == "en"
    assert language_of("Explain the word 道 as used in Chinese philosophy") == "en"
