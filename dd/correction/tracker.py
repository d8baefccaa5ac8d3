"""What users ask of whatever corrects a model: which samples come, and what the estimate is."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from dd.correction.attachment import Attachment
from dd.correction.estimate import Estimate
from dd.correction.evaluation import corrected_estimate, corrected_mean, corrected_outputs
from dd.correction.hook import Forward
from dd.correction.optimizer_state import OptimizerState
from dd.noise.model import NoiseModel
from dd.samples.loaders import tracked

__all__ = ["Tracker"]


class Tracker:
    """What is asked of an optimizer that may be attached to a model, whatever moves its shadows."""

    _attachment: Attachment | None

    def _forward(self) -> Forward | None:
        """What the next forward of the attached model does, or None while unattached."""
        raise NotImplementedError

    def _store(self) -> OptimizerState:
        """The state that the shadows are kept in."""
        raise NotImplementedError

    @property
    def layer(self) -> nn.Linear | None:
        """The decoupled layer, or None while unattached."""
        return None if self._attachment is None else self._attachment.layer

    @property
    def noise(self) -> NoiseModel | None:
        """The noise model in use, or None while unattached or before the first step fits one."""
        return None if self._attachment is None else self._attachment.noise

    @property
    def shadow(self) -> Tensor | None:
        """Q, shape (bins, n, k), or None while unattached or before the first step.

        Of inputs with several rows a sample (bins, n, rows, k).
        """
        attachment = self._attachment
        if attachment is None:
            return None
        self._settle()
        found = self._store().of(attachment.weight).get("shadow")
        rows = attachment.samples.rows_each or 1
        return found if found is None or rows == 1 else found.unflatten(1, (-1, rows))

    @property
    def needs_graph(self) -> bool:
        """Whether a step needs ``loss.backward(create_graph=True)``."""
        return self._attachment is not None and self._attachment.estimator.second_order

    def track(self, loader: Any) -> Any:
        """Tell the optimizer which samples every batch of a loader holds.

        Needed for mini-batches of samples that the noise model was not fitted on.

        Args:
            loader: a ``torch.utils.data.DataLoader`` over a map-style dataset, or any sized
                iterable of batches of sample indices.

        Returns:
            An iterable of the same batches in the same form; iterate over it in place of
            ``loader``.

        Raises:
            ValueError: if unattached, or the loader's samples have no fixed index.
            TypeError: if the loader is neither.

        Example:
            >>> from torch.utils.data import DataLoader, TensorDataset
            >>> noise = dd.NoiseModel(torch.tensor([1.0]), torch.tensor([50.0]))  # I, of no samples
            >>> optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
            >>> loader = DataLoader(TensorDataset(X, y), batch_size=100, shuffle=True)
            >>> for inputs, labels in optimizer.track(loader):
            ...     optimizer.zero_grad()
            ...     criterion(model(inputs), labels).backward()
            ...     optimizer.step()
            >>> optimizer.shadow.shape
            torch.Size([1, 500, 4])
        """
        return tracked(loader, self._required("track()").samples)

    @_disable_dynamo
    def batch(self, indices: Any) -> None:
        """Tell which samples the next training forward holds.

        Args:
            indices: integers from 0, one a row, shape (m,).

        Raises:
            ValueError: if unattached, or the indices are not integers in range.

        Example:
            >>> noise = dd.NoiseModel(torch.tensor([1.0]), torch.tensor([50.0]))  # I, of no samples
            >>> optimizer = dd.DecoupledDescent(model, lr=0.1, noise=noise)
            >>> for indices in torch.randperm(500).split(100):
            ...     optimizer.batch(indices)
            ...     optimizer.zero_grad()
            ...     criterion(model(X[indices]), y[indices]).backward()
            ...     optimizer.step()
        """
        samples = self._required("batch()").samples
        try:
            index = torch.as_tensor(indices)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"DecoupledDescent: batch() takes the integer indices of samples; {error}"
            ) from error
        samples.withdraw()
        samples.announce(index)

    @_disable_dynamo
    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Tensor:
        """Mean of the corrected loss over batches, an estimate of the test loss; changes nothing.

        The model is in eval mode, but for the correction.

        Args:
            batches: training samples, such as the loader used in training.
            loss: takes a batch, runs the model on it once, and returns the mean loss over its
                samples, or several means in one tensor, such as loss and error.

        Returns:
            The mean over all samples, of the shape that ``loss`` returns.

        Raises:
            ValueError: if unattached, or there are no batches.
            RuntimeError: if a batch did not pass through the decoupled layer.

        Example:
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
            >>> for step in range(10):
            ...     optimizer.zero_grad()
            ...     criterion(model(X), y).backward()
            ...     optimizer.step()
            >>> halves = [(X[:250], y[:250]), (X[250:], y[250:])]
            >>> loss = lambda batch: criterion(model(batch[0]), batch[1])
            >>> tracked = optimizer.evaluate(halves, loss)
            >>> plain = criterion(model.eval()(X), y)  # which the samples have made too low
            >>> bool(plain < tracked)
            True
        """
        self._settle()
        return corrected_mean(self._required("evaluate()"), batches, loss)

    @_disable_dynamo
    @torch.no_grad()
    def estimate(
        self,
        batches: Iterable[Any],
        losses: Callable[[Any], Tensor],
        confidence: float = 0.9,
    ) -> Estimate:
        """Estimate of the test loss from training samples, with a confidence interval.

        As :meth:`evaluate`, but from the loss of every sample.

        Args:
            batches: training samples, such as the loader used in training; each sample once.
            losses: takes a batch, runs the model on it once, and returns the loss of each of its
                samples, shape (m,), or several figures of each, such as loss and error, shape
                (m, j).
            confidence: probability that the interval is meant to hold the test loss with.

        Raises:
            ValueError: if unattached, there are not at least two samples, ``losses`` does not
                return a row a sample, or the confidence is out of range.
            RuntimeError: if a batch did not pass through the decoupled layer.

        Example:
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
            >>> for step in range(10):
            ...     optimizer.zero_grad()
            ...     criterion(model(X), y).backward()
            ...     optimizer.step()
            >>> wrong = lambda batch: (model(batch[0]).argmax(1) != batch[1]).float()
            >>> print(optimizer.estimate([(X, y)], wrong))  # of the test error
            0.0... (90 %: 0.0... to 0..., n = 500)
        """
        self._settle()
        return corrected_estimate(self._required("estimate()"), batches, losses, confidence)

    @_disable_dynamo
    @torch.no_grad()
    def predict(self, batches: Iterable[Any]) -> Tensor:
        """Corrected outputs of training samples, each as if it had been left out of training.

        Args:
            batches: of training samples: inputs, or sequences that begin with the inputs, such as
                a ``DataLoader`` yields.

        Returns:
            What the model returns, in the order of the batches, shape (n, ...).

        Raises:
            ValueError: if unattached, or there are no batches.
            RuntimeError: if a batch did not pass through the decoupled layer.
            TypeError: if the model returns something else than a tensor.

        Example:
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
            >>> for step in range(10):
            ...     optimizer.zero_grad()
            ...     criterion(model(X), y).backward()
            ...     optimizer.step()
            >>> optimizer.predict([(X[:200], y[:200]), (X[200:], y[200:])]).shape
            torch.Size([500, 2])
        """
        self._settle()
        return corrected_outputs(self._required("predict()"), batches)

    @_disable_dynamo
    def drop_forward(self) -> None:
        """Forget training forwards that will get no step, after a skipped or interrupted one.

        Example:
            >>> optimizer = dd.DecoupledDescent(model, lr=0.5, noise=dd.NoiseModel.fit(X, y))
            >>> loss = criterion(model(X), y)
            >>> loss.backward()
            >>> if not loss > 100:  # a step that is not to be made
            ...     optimizer.drop_forward()
        """
        if self._attachment is not None:
            self._attachment.drop()
            self._attachment.samples.release()
            self._attachment.verdicts.withdraw()
            if self._store().read(self._attachment.weight, "shadow") is None:
                self._attachment.forget()

    def _required(self, what: str) -> Attachment:
        """The attachment.

        Raises:
            ValueError: if there is none.
            RuntimeError: if another optimizer has taken the layer over.
        """
        if self._attachment is None:
            raise ValueError(
                f"DecoupledDescent: {what} needs an attached optimizer; construct it with the "
                "module, or call attach(module)"
            )
        self._attachment.require_own()
        return self._attachment

    def _settle(self) -> None:
        """Bring the shadows of all samples up to date, and raise what is still to be told."""
        if self._attachment is not None:
            self._attachment.verdicts.settle(wait=True)
            with torch.no_grad():
                self._attachment.shadows.flush(self._store().of(self._attachment.layer.weight))

    def _correct(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        forward = self._forward()
        return None if forward is None else forward.at_layer(layer, inputs, output)

    def _correct_scores(self, head: nn.Module, inputs: Tensor, output: Tensor) -> Tensor | None:
        forward = self._forward()
        return None if forward is None else forward.at_head(head, inputs, output)
