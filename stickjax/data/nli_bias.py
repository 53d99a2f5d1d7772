"""Find words that reveal the label of a row, and rows that a model labels wrongly if it reads only one text.

In a data set of sentence pairs, such as SNLI, the second sentence alone can reveal the label (Tan, Shen, Huang and
Courville, 2019, arXiv 1906.09635; Gururangan et al., 2018, arXiv 1803.02324). `word_associations` lists such words.
`filtered_rows` returns the rows that a model labels wrongly if it reads only the second sentence. A model that reads
both sentences can then be evaluated on these rows.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from stickjax.data.tables import Record
from stickjax.data.tokenizer import words_of


class Association(NamedTuple):
    """A word and a label that occur together in rows. `pmi` is their pointwise mutual information in bits.

    `together` is the number of rows that have this label and whose text contains the word. `rows` is the number of all
    rows whose text contains the word, with any label.
    """

    word: str
    label: str
    pmi: float
    together: int
    rows: int


def word_associations(
    rows: Iterable[tuple[str, str]], *, min_count: int = 5, smoothing: float = 10.0
) -> dict[str, list[Association]]:
    r"""Find the words that occur more often with one label than with the others.

    Return {label: [Association, ...]}, where the words of a label are sorted by their pointwise mutual information
    (pmi) with the label, the highest first. Only words with a positive pmi are returned.

    N is the number of rows, n(w) the number of rows whose text has the word w at least once, n(y) the number of rows
    with the label y, and n(w, y) the number of rows with both. The pointwise mutual information is

      pmi(w, y) = log2( p(y | w) / p(y) ),   p(y) = n(y) / N,   p(y | w) = (n(w, y) + s p(y)) / (n(w) + s)

    with s = `smoothing`. The smoothing has the effect of s additional rows that contain the word w, with labels in the
    same proportions as in all rows. So the pmi of a rare word is close to 0.

    Args:
      rows: (text, label) of every row; `stickjax.data.tokenizer.words_of` splits the text.
      min_count: a word that occurs in fewer rows is left out.
      smoothing: s, the number of additional rows for each word.

    Raises:
      ValueError: `min_count` is below 1, `smoothing` is below 0, or there are no rows.

    >>> rows = [("nobody sleeps", "no"), ("a man sleeps", "yes"), ("nobody is here", "no"), ("a dog is here", "yes")]
    >>> word_associations(rows, min_count=2, smoothing=1)["no"]
    [Association(word='nobody', label='no', pmi=0.7369655941662062, together=2, rows=2)]
    """
    if min_count < 1:
        raise ValueError(f"min_count={min_count} must be at least 1")
    if smoothing < 0:
        raise ValueError(f"smoothing={smoothing} must be at least 0")
    both, of_word, of_label = Counter(), Counter(), Counter()
    for text, label in rows:
        of_label[label] += 1
        words = set(words_of(text))
        of_word.update(words)
        both.update((word, label) for word in words)
    if not (total := of_label.total()):
        raise ValueError("there are no rows to count words in")
    found: dict[str, list[Association]] = {label: [] for label in sorted(of_label)}
    for (word, label), together in both.items():
        if (count := of_word[word]) < min_count:
            continue
        prior = of_label[label] / total
        pmi = math.log2((together + smoothing * prior) / (count + smoothing) / prior)
        if pmi > 0:
            found[label].append(Association(word, label, pmi, together, count))
    for words in found.values():
        words.sort(key=lambda one: (-one.pmi, -one.together, one.word))
    return found


def majority_share(labels: Sequence) -> float:
    """Return the fraction of rows with the most frequent label.

    A classifier that always chooses this label has this accuracy. `labels` has the label of every row.

    >>> majority_share(["no", "yes", "no"])
    0.6666666666666666
    """
    return Counter(labels).most_common(1)[0][1] / len(labels)


def filtered_rows(rows: Sequence[Record], chosen: Sequence[str]) -> list[Record]:
    """Return the rows for which a model chose a wrong label.

    The model may be one that reads only one of the two texts of a row. `chosen` has the label that the model chose for
    each row. Raises ValueError if `rows` and `chosen` differ in length.

    >>> rows = [Record(("it rains",), "yes", 2), Record(("it snows",), "no", 3)]
    >>> filtered_rows(rows, ["yes", "yes"])
    [Record(texts=('it snows',), label='no', line=3)]
    """
    if len(rows) != len(chosen):
        raise ValueError(f"there are {len(rows)} rows, but {len(chosen)} chosen labels")
    return [row for row, label in zip(rows, chosen, strict=True) if row.label != label]


def lines_of(path: str | Path, lines: Iterable[int]) -> bytes:
    """Copy some rows of a file of labelled rows, and return them as the content of a new file of the same format.

    `lines` are the numbers of the lines to copy, counted from 1. The lines are copied with all their fields. The first
    line of a table (.tsv or .csv), which has the names of the columns, is always copied. The new file can be used as
    `data.heldout_path`, for example.

    Raises ValueError for a .csv file in which a value contains a line break.
    """
    file = Path(path)
    is_table, kept = file.suffix.lower() in (".tsv", ".csv"), set(lines)
    content = file.read_bytes().split(b"\n")
    if file.suffix.lower() == ".csv" and any(line.count(b'"') % 2 for line in content):
        raise ValueError(f"{file}: a value has several lines; rows are copied only from a file with one line per row")
    return b"".join(
        line.rstrip(b"\r") + b"\n" for i, line in enumerate(content, 1) if i in kept or (is_table and i == 1)
    )
