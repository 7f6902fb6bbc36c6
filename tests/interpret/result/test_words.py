"""Tokens joined to words, for the marks of each kind of tokenizer."""

import pytest

from vlattn_fast.interpret.result.numbers.words import _byte_table, find_marks, join_tokens


def byte_level(text: str) -> str:
    """A token as byte-level BPE writes it."""
    names = {byte: name for name, byte in _byte_table().items()}
    return "".join(names[byte] for byte in text.encode())


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["The", "Ġgir", "affe", "'s", "Ġneck", ",", "Ġ(", "long", ")", "Ċ"], "The| giraffe's| neck|,| (|long|)| ⏎"),
        (["Yes", ".ĊĊ"], "Yes|."),
        (["<|im_start|>", "user", "Ċ", "Ġhi"], "<|im_start|>|user| ⏎| hi"),
        (["Ġa", *map(byte_level, ["你好", "世界", "。"])], "a|你好|世界|。"),
        (["Ġa", *(byte_level("你")[i] for i in range(3)), "Ġcaf", byte_level("é")], "a|你| café"),
        (["▁a", "▁gir", "affe", ".", "</s>", "▁b"], "a| giraffe|.|</s>| b"),
        (["▁a", "<0xE4>", "<0xBD>", "<0xA0>", "▁", "x"], "a|你| x"),
        (["a</w>", "gir", "affe</w>", ",</w>", "b</w>"], "a| giraffe|,| b"),
        (["a</w>", "caf", *byte_level("é"), ",</w>", byte_level("犬") + "</w>", *byte_level("猫")], "a| café|,| 犬| 猫"),
        ([byte_level("你好"), *byte_level("吗"), byte_level("世界")[:4]], "你好|吗|世\ufffd"),
        (["caf", byte_level("é")[0], byte_level("é")[1]], "café"),
        (["caf", "##é", "Łódź", "Ã"], "café| Łódź| Ã"),
        (["a", "gir", "##affe", ".", "[SEP]", "b"], "a| giraffe|.| [SEP]| b"),
        (["7", "8", "9"], "7| 8| 9"),
        (["<b>", "$x", "_y_", "^"], "<b>| $x| _y_| ^"),
        ([""], "␣"),
        ([], ""),
    ],
)
def test_words(tokens, words):
    found = join_tokens(tokens)
    assert "|".join(" " * word.space + word.text for word in found) == words
    assert [index for word in found for index in word.tokens] == list(range(len(tokens)))


def test_marks_are_known_from_the_whole_vocabulary():
    """An answer may begin inside a line: none of its tokens has a mark then."""
    assert [word.text for word in join_tokens(["gir", "affe"])] == ["gir", "affe"]
    assert [word.text for word in join_tokens(["gir", "affe"], find_marks(["▁the"]))] == ["giraffe"]
