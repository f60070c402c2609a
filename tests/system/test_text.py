from fastcnn.system.text import table


def test_a_table_aligns_wide_letters_and_shows_markup_as_it_is() -> None:
    assert table(["class", "photos", "[b]note"], [["日本", "1", "[red]"], ["b", "10,000", ""]], right=["photos"]) == (
        "class  photos  [b]note\n日本        1  [red]\nb      10,000"
    )
