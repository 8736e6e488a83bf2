"""What a task is: transforms to compare, and their scores."""

from collections.abc import Callable
from dataclasses import dataclass

from embeddings.scores import Score
from embeddings.settings import Setting


@dataclass(frozen=True)
class Task:
    """Scores transforms on one kind of vectors.

    Attributes
    ----------
    name, vectors : str
        What is measured, and on which vectors.
    fitted_on : str
        The texts or pictures that a transform is fitted on; never those that are the queries.
    rows, dimensions : int
        The shape of the vectors that a transform is fitted on.
    settings : list of Setting
        The transforms to compare, the first of which leaves the vectors as they are.
    score : callable
        Returns the scores of a setting by their names.
    """

    name: str
    vectors: str
    fitted_on: str
    rows: int
    dimensions: int
    settings: list[Setting]
    score: Callable[[Setting], dict[str, Score]]
