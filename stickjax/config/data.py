"""The config of the data: the source, the tokenizer, the held-out part, and the size of a batch."""

import dataclasses
from dataclasses import dataclass

from stickjax.config.fields import SEED, check_fields, field, one_of, shown
from stickjax.config.mixture import mixture_of

SOURCES = ("stdlib", "text", "tokens", "logic", "listops", "scan", "questions", "recall", "labelled", "mixture")
STORED = ("text", "tokens", "labelled")  # sources that read data.path
# {source: the names of its splits}. A split says which examples are for training, and which are for tests.
SPLITS = {
    "logic": ("A", "B", "C"),
    "scan": ("simple", "length", "length_tuning", "add_jump", "add_turn_left", "around_right"),
}


@dataclass(frozen=True)
class DataConfig:
    """The config of the data: the source, the tokenizer, the held-out part, and the size of a batch."""

    source: str = field(
        "stdlib",
        "stdlib: the running Python's standard library; text: files, folders, jsonl, parquet or a dataset; tokens: "
        "a token file; labelled: rows of a table, each with a label; logic, listops, scan, questions, recall: "
        "generated; mixture: the sources of data.mixture; several sources, separated by commas, are mixed in equal "
        "shares",
    )
    path: str | None = field(None, "file or folder that the sources text, tokens and labelled read")
    mixture: tuple | None = field(
        None,
        "table of rows SOURCE:PATH:WEIGHT or SOURCE:WEIGHT, such as text:books:5,text:code:3,stdlib:2; the sequences "
        "of the sources are mixed in the proportions of the weights; a source that ends starts over; the table "
        "replaces source and path",
    )
    heldout_path: str | None = field(
        None, "held-out file or folder; None: a part of the data is held out (heldout_every)"
    )
    heldout_every: int = field(
        10,
        "n: every n-th document or labelled row is held out; of a token file or a single document, roughly the last "
        "1/n of the tokens",
        at_least=2,
    )
    split: str | None = field(
        None,
        "how a generated source is divided into training and test examples; logic: A, B, C; scan: simple, length, "
        "length_tuning, add_jump, add_turn_left, around_right; None: at random",
    )
    valid_every: int = field(
        0,
        "n: 1/n of the training examples, chosen at random, is not used for training, but for validation; 0: none",
        at_least=0,
    )
    tokenizer: str = field(
        "byte", "byte; the path of a Hugging Face tokenizer.json; or words: the words of the labelled training rows"
    )
    eot: str | None = field(
        None,
        "added token that ends a text, such as '<|im_end|>'; None: read from the files in the folder of tokenizer.json",
    )
    cache: str | None = field(
        None,
        "folder that keeps the tokens of a text, so that the same text is tokenized only once; None: tokenize it in "
        "every run",
    )
    min_count: int = field(
        1, "tokenizer=words: words that occur less often in the training rows become <unknown>", at_least=1
    )
    text_field: str = field(
        "text", "field of a jsonl line, or column of a parquet file or dataset, that holds the text"
    )
    left_field: str = field("sentence1", "labelled: field with the text, or with the first of two texts")
    right_field: str | None = field(None, "labelled: field with the second text; None: a row has one text")
    label_field: str = field("label", "labelled: field with the label")
    unlabelled: str | None = field(
        None, "labelled: rows with this label are left out, such as '-' in SNLI; None: no row is left out"
    )
    labels: str | None = field(
        None, "labelled: JSON file with the list of labels; None: the labels of the training rows"
    )
    examples: int = field(
        100_000,
        "number of generated examples: lines of text (scan: at most 20910), pairs or sentences for a classifier, or "
        "training examples of questions",
        at_least=1,
    )
    T: int = field(256, "tokens in one sequence", at_least=1)
    B: int = field(16, "sequences in one step, in all processes and microbatches together", at_least=1)
    seed: int = field(0, "seed of the order of the sequences", at_least=0, at_most=SEED)
    curriculum: int = field(
        0,
        "number of steps at the start that use only short examples: first the shortest tenth, then more; 0: none",
        at_least=0,
    )

    def __post_init__(self):
        object.__setattr__(self, "mixture", mixture_of(self.mixture))
        if self.mixture is not None and self.source == "stdlib":  # the default
            object.__setattr__(self, "source", "mixture")
        check_fields(self)
        for i, source in enumerate(self.sources):
            one_of("source", source, SOURCES)
            if source in self.sources[:i]:
                raise ValueError(f"source={self.source!r} names {source!r} twice")
        if self.tokenizer in ("byte", "words") and self.eot is not None:
            raise ValueError(
                f"eot={self.eot!r} needs a tokenizer.json: set data.tokenizer to its path; the tokenizer "
                f"{self.tokenizer!r} has its own end-of-text token"
            )
        if len(self.sources) > 1 and self.heldout_path is not None:
            raise ValueError(f"heldout_path={self.heldout_path!r} needs one source, got source={self.source!r}")
        for name in ("right_field", "unlabelled", "labels"):
            if getattr(self, name) is not None and self.source != "labelled":
                raise ValueError(f"{name}={getattr(self, name)!r} needs source='labelled', not {self.source!r}")
        self._check_mixture()
        self._check_path()
        self._check_parts()

    def _check_mixture(self) -> None:
        if self.mixture is None:
            if "mixture" in self.sources:
                raise ValueError(
                    f"source={self.source!r} needs data.mixture, a list of rows SOURCE:PATH:WEIGHT or SOURCE:WEIGHT, "
                    "such as text:books:5,stdlib:2; set data.mixture, or another data.source"
                )
            return
        if self.source != "mixture":
            raise ValueError(
                f"mixture={shown(self.mixture_text)} needs source='mixture', not {self.source!r}; set "
                "data.source=mixture, or data.mixture=none"
            )
        for name in ("path", "heldout_path"):
            if (path := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={path!r} is not used with a mixture, because the rows of data.mixture have the paths; "
                    f"leave data.{name} out, or set data.mixture=none"
                )
        for row in self.mixture:
            one_of("mixture: source", row.source, [x for x in SOURCES if x not in ("labelled", "mixture")])
            if (row.source in STORED) != (row.path is not None):
                needs = "has a path, but this source reads no file" if row.path else "needs a path: SOURCE:PATH:WEIGHT"
                raise ValueError(f"mixture: the row {shown(str(row))} {needs}")

    def _check_path(self) -> None:
        stored = [source for source in self.sources if source in STORED]
        if "labelled" in stored and len(self.sources) > 1:
            raise ValueError(f"source={self.source!r}: labelled rows cannot be mixed with other sources")
        if len(stored) > 1:
            raise ValueError(
                f"source={self.source!r}: the sources 'text' and 'tokens' both read data.path; use one of them, or "
                "data.mixture"
            )
        if not stored and self.path is not None:
            raise ValueError(f"path={self.path!r} is not used by source={self.source!r}; did you mean source='text'?")
        if stored and self.path is None:
            raise ValueError(f"source={self.source!r} needs a path: set data.path to a file or folder")
        if self.tokenizer == "words" and self.source != "labelled":
            raise ValueError(
                f"tokenizer='words' needs source='labelled', not {self.source!r}: the vocabulary is collected from the "
                "labelled training rows"
            )

    def _check_parts(self) -> None:
        if self.valid_every == 1:
            raise ValueError("valid_every=1 leaves no example for training; it must be 0 or at least 2")
        if self.split is not None:
            if self.source not in SPLITS:
                known = " and ".join(SPLITS)
                raise ValueError(
                    f"split={self.split!r} is not used by source={self.source!r}; only {known} have splits, so leave "
                    "data.split out"
                )
            one_of(f"source={self.source!r}: split", self.split, SPLITS[self.source])

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.source.split(","))

    @property
    def parts(self) -> "tuple[DataConfig, ...]":
        """One config for each source of the mixture, in the order of the rows; without a mixture, only this config."""
        if self.mixture is None:
            return (self,)
        rows = self.mixture
        return tuple(dataclasses.replace(self, source=row.source, path=row.path, mixture=None) for row in rows)

    @property
    def mixture_text(self) -> str:
        """The table of the mixture as a text, such as "text:books:5,stdlib:2"; "" without a mixture."""
        return ",".join(map(str, self.mixture or ()))

    @property
    def tokens_per_step(self) -> int:
        return self.B * self.T
