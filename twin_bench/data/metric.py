"""What a metric is: a function of references and answers, its score in points, and the score's standard error."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from twin_bench.data.resampling import Array, OfDraws, Resampled
from twin_bench.errors import InputError, first_line, shown
from twin_bench.files import digest_code

Answers = Literal["label", "probabilities", "number"]
"""What is compared with the references: predicted labels, the labels' probabilities, or predicted numbers."""
Function = Callable[[Array, Array], float]
LARGEST_LABEL = 2**31
LARGEST_WEIGHTS = 2**22
"""How many numbers the weights of the draws that are computed at once may be: 32 MiB."""
ROUNDING = 1e-4
"""By how much a probability may leave the range from 0 to 1: a model's may be float16."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """A metric: a function (references (n,), answers) -> its value, and what is to be known about it.

    `answers` says what the function takes beside the references: `label`, predicted label ids (n,); `probabilities` of
    the labels, (n, labels); or a `number` each, (n,). Labels, the references' too, are int64, all else is float64.
    `percent` says that the value is a fraction, which is shown times 100. `labels` is how many labels the task must
    have, if not any number. `resampled` computes all draws of the bootstrap at once. `closed_form` computes the
    standard error of the value where a formula gives it. Without either, the bootstrap calls the function for each
    draw.
    """

    name: str
    function: Function
    answers: Answers = "label"
    higher_is_better: bool = True
    percent: bool = True
    resampled: Resampled | None = None
    closed_form: Function | None = None
    labels: int | None = None

    def score(self, references: Sequence[float] | Array, answers: Sequence[Any] | Array) -> float:
        """Return the score in points.

        Raises InputError, which names the metric, for no rows, lists of different lengths, numbers that are not finite
        or no labels, and where the function raises an error or returns something that is no finite number.
        """
        return self._points(self._value(*self._prepared(references, answers)))

    def standard_error(
        self,
        references: Sequence[float] | Array,
        answers: Sequence[Any] | Array,
        *,
        clusters: Sequence[Any] | None = None,
        seed: int = 0,
        resamples: int = 1000,
    ) -> float:
        """Return the standard error of `score` over draws of the rows, in the same points.

        `clusters` are the rows' sources (n,), where several rows share one: then whole clusters are drawn, as many as
        there are, because rows of one source are not independent. A single cluster gives 0.

        Accuracy has the closed form sqrt(p (1 - p) / (n - 1)). The other metrics are bootstrapped: the error is the
        standard deviation of the score over `resamples` draws of n rows with replacement (Efron 1979). It is the same
        for the same `seed` and rows, in whatever order these come. A single row gives 0.

        A draw in which the metric is undefined, such as auroc where all rows have one label, is left out. The log says
        how many are. Errors are those of `score`, and InputError if the metric is defined in fewer than two draws.
        """
        references_, answers_ = self._prepared(references, answers)
        rows = len(references_)
        if rows == 1:
            return 0.0
        rng = np.random.default_rng(seed)
        order = np.lexsort(np.vstack([references_, answers_.T]))  # the draws must not depend on the rows' order
        references_, answers_ = references_[order], answers_[order]
        if clusters is None and self.closed_form is not None:
            return self._points(self.closed_form(references_, answers_))
        self._value(references_, answers_)  # says why where no draw can have a value
        if clusters is not None:
            _, source = np.unique(np.asarray(clusters, dtype=str)[order], return_inverse=True)
            values = self._of_clusters(references_, answers_, source, rng, resamples)
        elif self.resampled is not None:
            values = self._of_all_draws(references_, answers_, rng, resamples)
        else:
            draws = (rng.integers(0, rows, rows) for _ in range(resamples))
            values = self._of_each_draw(references_, answers_, draws)
        return self._points(self._deviation(values))

    def over_draws(self, references: Sequence[float] | Array, answers: Sequence[Sequence[Any] | Array]) -> OfDraws:
        """Return a function of draws of the rows, which gives the values of m models that answered the same rows.

        `references` are (n,). `answers` are m models' answers, each as `score` takes them. The function takes weights
        (n, draws), whole numbers, which say how often each row is in each draw. It returns the values (m, draws), not
        yet in points; NaN where the metric is undefined. Errors are those of `score`. A metric without a form for all
        draws at once is called m times a draw.
        """
        prepared = [self._prepared(references, own) for own in answers]
        if self.resampled is not None:
            return self.resampled(prepared[0][0], np.stack([own for _, own in prepared]))
        return lambda weights: np.stack(
            [self._of_each_draw(*own, (_rows_of(draw) for draw in weights.T)) for own in prepared]
        )

    def fits(self, labels: int) -> bool:
        """Return whether the metric is one for a task of so many labels; 1 is a number to be predicted."""
        return (self.answers == "number") == (labels == 1) and self.labels in (None, labels)

    def require(self, labels: int, where: str) -> None:
        """Raise an InputError that begins with `where` and says what to take instead, unless the metric `fits`."""
        if self.fits(labels):
            return
        if labels == 1:
            why = "labels, and the task's answers are numbers; take a metric of numbers, such as pearson or mse"
        elif self.answers == "number":
            why = f"numbers, and the task has {labels} labels; take a metric of labels, such as acc or mcc"
        else:
            why = f"{self.labels} labels, and there are {labels}; take one of any labels, such as f1_macro or mcc"
        raise InputError(f"{where}: {self.name} is a metric of {why}")

    @property
    def identity(self) -> list[str]:
        """What stands for the metric in a key: its name, and the digest of the file it is defined in if not ours."""
        return [self.name, *digest_code(getattr(self.function, "__module__", ""))]

    def _points(self, value: float) -> float:
        return float(100 * value if self.percent else value)

    def _value(self, references: Array, answers: Array) -> float:
        try:
            value: Any = self.function(references, answers)
        except Exception as error:  # whatever a function of the user's raises
            said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"metric {self.name} can't be computed: {said}") from error
        if not isinstance(value, Real) or isinstance(value, bool):
            raise InputError(f"metric {self.name} returned {shown(value)}; it must return a number")
        if not math.isfinite(value):
            rows = f"these {len(references)} rows, of {len(np.unique(references))} different references"
            raise InputError(f"metric {self.name} is {value} for {rows}; score other rows, or take another metric")
        return float(value)

    def _of_all_draws(self, references: Array, answers: Array, rng: np.random.Generator, resamples: int) -> Array:
        """Return the metric's values in the draws, computed at once."""
        assert self.resampled is not None
        counts: Array = np.ones(len(references))
        if self.answers == "label":
            # A draw of rows is a draw of (reference, answer) cells, and there are only a few distinct ones.
            (references, answers), counts = np.unique(np.stack([references, answers]), axis=1, return_counts=True)
        of_draws = self.resampled(references, answers[None])
        return np.concatenate([of_draws(weights)[0] for weights in _weights(counts, len(references), rng, resamples)])

    def _of_clusters(
        self, references: Array, answers: Array, source: Array, rng: np.random.Generator, resamples: int
    ) -> Array:
        """Return the metric's values in draws of whole clusters. `source` (n,) numbers each row's cluster."""
        drawn = _weights(np.ones(int(source.max()) + 1), len(source), rng, resamples)
        if self.resampled is not None:
            of_draws = self.resampled(references, answers[None])
            return np.concatenate([of_draws(weights[source])[0] for weights in drawn])
        return self._of_each_draw(references, answers, (_rows_of(draw[source]) for part in drawn for draw in part.T))

    def _of_each_draw(self, references: Array, answers: Array, draws: Iterable[Array]) -> Array:
        """Return the metric's value in each draw of rows, NaN where it is undefined."""

        def value(rows: Array) -> float:
            try:
                return self._value(references[rows], answers[rows])
            except InputError:
                return math.nan

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a draw that lacks a label is no news
            return np.asarray([value(rows) for rows in draws])

    def _deviation(self, values: Array) -> float:
        """Return the standard deviation of the values in the draws in which the metric is defined."""
        undefined = int(np.isnan(values).sum())
        if undefined:
            where = f"undefined in {undefined} of {len(values)} draws of the rows"
            if len(values) - undefined < 2:
                raise InputError(f"metric {self.name} has no standard error: it is {where}; score more rows")
            _log.warning("%s is %s, which its standard error leaves out", self.name, where)
        return float(np.std(values[~np.isnan(values)], ddof=1))

    def _prepared(self, references: Any, answers: Any) -> tuple[Array, Array]:
        """Return both as the arrays that the function takes. InputError for what no metric is defined for."""
        name = f"metric {self.name}"
        if len(references) != len(answers) or len(references) == 0:
            raise InputError(f"{name} of {len(references)} references and {len(answers)} answers; each row needs both")
        try:
            references_, answers_ = np.array(references, dtype=np.float64), np.array(answers, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: references and answers must be numbers ({first_line(error)})") from None
        if not np.isfinite(references_).all() or not np.isfinite(answers_).all():
            raise InputError(f"{name}: references and answers must be finite")
        axes, shape = (2, "(n, labels)") if self.answers == "probabilities" else (1, "(n,)")
        if references_.ndim != 1 or answers_.ndim != axes:
            found = f"{references_.shape} and {answers_.shape}"
            raise InputError(f"{name}: references must be (n,) and answers {shape}; they are {found}")
        if self.answers == "number":
            return references_, answers_
        references_ = self._labels("reference", references_)
        if self.labels is not None and references_.max() >= self.labels:
            self.require(int(references_.max()) + 1, "references")
        if self.answers == "label":
            return references_, self._labels("answer", answers_)
        if not 0 <= references_.min() <= references_.max() < answers_.shape[1]:
            raise InputError(f"{name}: references must be labels from 0 to {answers_.shape[1] - 1}, as the columns are")
        if answers_.min() < -ROUNDING or answers_.max() > 1 + ROUNDING:
            found = f"found {answers_.min():g} and {answers_.max():g}"
            raise InputError(f"{name}: probabilities must be from 0 to 1; {found}")
        return references_, answers_

    def _labels(self, what: str, values: Array) -> Array:
        """Return labels as integers."""
        wrong = values[(values != np.rint(values)) | (np.abs(values) >= LARGEST_LABEL)]
        if len(wrong):
            raise InputError(f"metric {self.name}: {what} {wrong[0]:g} is no label's id, which is a whole number")
        return values.astype(np.int64)


def _weights(counts: Array, width: int, rng: np.random.Generator, draws: int) -> Iterator[Array]:
    """Yield the weights (k, some draws) of draws of as many rows as there are; kind k has so many of them.

    `width` is how many numbers a draw becomes where it is used.
    """
    rows, size = int(counts.sum()), max(1, LARGEST_WEIGHTS // width)
    for start in range(0, draws, size):
        drawn = rng.multinomial(rows, counts / rows, size=min(size, draws - start))
        yield drawn.T.astype(np.float64)


def _rows_of(draw: Array) -> Array:
    """Return the rows that are in a draw, of how often each is in it (n,)."""
    return np.repeat(np.arange(len(draw)), draw.astype(np.int64))
