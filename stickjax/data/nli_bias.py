"""Find words that give away the label of a row, and rows whose label a model does not find from one text alone.

In a data set of sentence pairs, such as SNLI, the second sentence alone can give away the label (Tan, Shen, Huang and
Courville, 2019, arXiv 1906.09635; Gururangan et al., 2018, arXiv 1803.02324). `word_associations` lists the words that
do so. `filtered_rows` returns the held-out rows that a model of the second sentence alone gets wrong; a model of both
sentences is evaluated on them.
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

    `together` is the number of rows that have both, and `rows` the number of rows that have the word.
    """

    word: str
    label: str
    pmi: float
    together: int
    rows: int


def word_associations(
    rows: Iterable[tuple[str, str]], *, min_count: int = 5, smoothing: float = 10.0
) -> dict[str, list[Association]]:
    r"""Return {label: its words, the highest pointwise mutual information first} of rows (text, label).

    Let n(w, y) be the number of rows with the label y whose text has the word w at least once, n(w) and n(y) the sums
    over labels and the number of rows with the label y, and N the number of rows. A word that occurs several times in a
    text counts once. The pointwise mutual information is

      pmi(w, y) = log2( p(y | w) / p(y) ),   p(y) = n(y) / N,   p(y | w) = (n(w, y) + s p(y)) / (n(w) + s)

    with s = `smoothing`. The smoothing acts like s further rows with the word, whose labels are divided like those of
    all rows: it pulls the value of rare words to 0.

    Args:
      rows: pairs of a text and its label; `stickjax.data.tokenizer.words_of` splits the text.
      min_count: words in fewer rows are left out.
      smoothing: the number of rows that are added for each word.

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
    """Return the share of the most frequent label: the accuracy of a classifier that always chooses it.

    >>> majority_share(["no", "yes", "no"])
    0.6666666666666666
    """
    return Counter(labels).most_common(1)[0][1] / len(labels)


def filtered_rows(rows: Sequence[Record], chosen: Sequence[str]) -> list[Record]:
    """Return the rows whose label is not the one that a model of one text alone chose.

    `chosen` has the label that the model chose for each row. Raises ValueError if their number differs.

    >>> rows = [Record(("it rains",), "yes", 2), Record(("it snows",), "no", 3)]
    >>> filtered_rows(rows, ["yes", "yes"])
    [Record(texts=('it snows',), label='no', line=3)]
    """
    if len(rows) != len(chosen):
        raise ValueError(f"there are {len(rows)} rows, but {len(chosen)} chosen labels")
    return [row for row, label in zip(rows, chosen, strict=True) if row.label != label]


def lines_of(path: str | Path, lines: Iterable[int]) -> bytes:
    """Return the content of a file of labelled rows with only some of its rows: the numbers of their lines, from 1.

    The rows are copied as they are, with all their fields, and so is the first line of a table. The result is the
    content of a file of the same format, for example for `data.heldout_path`. Raises ValueError for a .csv file in
    which a value has several lines.
    """
    file = Path(path)
    is_table, kept = file.suffix.lower() in (".tsv", ".csv"), set(lines)
    content = file.read_bytes().split(b"\n")
    if file.suffix.lower() == ".csv" and any(line.count(b'"') % 2 for line in content):
        raise ValueError(f"{file}: a value has several lines; rows of such a file cannot be copied by their lines")
    return b"".join(
        line.rstrip(b"\r") + b"\n" for i, line in enumerate(content, 1) if i in kept or (is_table and i == 1)
    )
