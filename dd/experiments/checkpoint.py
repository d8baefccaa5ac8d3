"""The last good state of a run, in one file."""

import copy
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dd.support.files import replacing

__all__ = ["FORMAT", "Checkpoint", "read_checkpoint"]

# Of the file's content; another one than this is refused.
FORMAT = 3


class Checkpoint:
    """Keeps ``checkpoint.pt``, which ``torch.load(path, weights_only=True)`` reads.

    The file maps ``"trial"`` to the trial, ``"optimizers"`` to the step, the model's, the
    optimizer's and its watchers' state (``"progress"``) of each optimizer by name, ``"optimizer"``
    to the name of the one in training, ``"run"`` to what the run has found so far, and
    ``"origin"`` to what it began with.

    Args:
        path: of the file; it is always a whole one.
        trial: which repetition the states belong to.
        origin: what the run and this trial began with.
        optimizers: states of this trial that are to stay.
    """

    def __init__(
        self,
        path: Path,
        trial: int,
        origin: Mapping[str, Any],
        optimizers: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.path = path
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "trial": trial,
            "origin": dict(origin),
            "optimizers": dict(optimizers or {}),
        }
        if optimizers:
            self._content["optimizer"] = list(optimizers)[-1]

    def keep(
        self,
        name: str,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Mapping[str, Any] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the state of one optimizer and write the file.

        Args:
            name: of the optimizer.
            step: updates made so far.
            model: as it is now.
            optimizer: as it is now.
            progress: what else belongs to this optimizer and trial.
            run: what belongs to all.

        Raises:
            OSError: if the file cannot be written; the one before it stays.
        """
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state["progress"] = dict(progress or {})
        # What comes later changes these states in place, and they are written once more with it.
        self._content["optimizers"][name] = copy.deepcopy(state)
        self._content["optimizer"] = name
        self._content["run"] = dict(run or {})
        self._write(step)

    def note(self, run: Mapping[str, Any]) -> None:
        """Replace what belongs to all optimizers and write the file; nothing before any state.

        Raises:
            OSError: if the file cannot be written; the one before it stays.
        """
        if self._content["optimizers"]:
            self._content["run"] = dict(run)
            self._write(max(state["step"] for state in self._content["optimizers"].values()))

    def _write(self, step: int) -> None:
        try:
            with replacing(self.path) as scratch:
                torch.save(self._content, scratch)
        # torch says RuntimeError where the disk is full.
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise OSError(
                f"the checkpoint of step {step} could not be written ({reason}): is the disk full? "
                "The one before it, if any, is whole, and resume= goes on from it."
            ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's content onto the CPU.

    Raises:
        ValueError: if the file is damaged, or of another format.
    """
    try:
        # torch does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        EOFError,
        KeyError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(
            f"{path} is damaged ({reason}), so that its run cannot be resumed; start it anew"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} was written by another version of this package (format {found}, expected "
            f"{FORMAT}); resume it with that version, or start anew"
        )
    return dict(content)
