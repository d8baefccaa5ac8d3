"""What the optimizer warns of, as notes of a run instead of raw Python warnings."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dd.samples.recognition import AugmentationWarning
from dd.watch.audit import CurvatureWarning
from dd.watch.divergence import DivergenceWarning
from dd.watch.response_watch import ResponseWarning
from dd.watch.shadow_size import ShadowWarning
from dd.watch.strain import StrainWarning

__all__ = ["collected_warnings_of"]

NOTED = (
    AugmentationWarning,
    CurvatureWarning,
    DivergenceWarning,
    ResponseWarning,
    ShadowWarning,
    StrainWarning,
)
PREFIX = re.compile(r"^(DecoupledDescent|dd\.decouple): ")


@contextmanager
def collected_warnings_of() -> Iterator[list[str]]:
    """Collect the sentences of the optimizer's warnings; every other warning takes its own way."""
    sentences: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def collect(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, NOTED):
                sentences.append(PREFIX.sub("", str(message)))
            else:
                show(message, category, *rest)

        warnings.showwarning = collect  # type: ignore[assignment]
        for category in NOTED:
            warnings.simplefilter("always", category)
        yield sentences
