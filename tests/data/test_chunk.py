from __future__ import annotations

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lmssl.data.chunk import document_rows, text_hash, utf8_hash
from lmssl.data.corpus import Document


@given(st.text(alphabet=" \t\n\r\v\fab\u00a0é\u3000", max_size=12))
def test_the_hash_is_that_of_the_text_without_ascii_white_space_around_it(text: str) -> None:
    assert utf8_hash(text.encode()) == text_hash(text) == xxhash.xxh3_64_intdigest(text.encode().strip())


def test_hashes_ignore_surrounding_whitespace() -> None:
    assert text_hash(" a b\n") == text_hash("a b") != text_hash("a  b")


def test_rows_count_bytes_not_characters() -> None:
    (row,) = document_rows([Document("é日".encode(), 3, 4, 5, 6)])
    assert row.tolist() == (text_hash("é日"), 5, 3, 4, 5, 6)
