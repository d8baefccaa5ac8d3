"""One run of an experiment: from its configuration to its folder of results."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig

from dd.baselines.hyperparameter_search import HyperparameterSearch, rates
from dd.data.reading import Reading
from dd.experiments.assembly import (
    make_model,
    make_selection,
    make_split,
    validate,
    with_seed,
)
from dd.experiments.batched_trials import (
    BatchedTrials,
    batchable_groups,
    doubts_in,
    failure_of,
    records_of,
)
from dd.experiments.checkpoint import Checkpoint
from dd.experiments.collected_warnings import collected_warnings_of
from dd.experiments.jobs import Job, build_job, followed, make_search
from dd.experiments.origin import changed_versions, origin_of, require_same_data
from dd.experiments.output import Output, first_token
from dd.experiments.prediction import check_theory, deviations, predicted
from dd.experiments.recorder import Recorder
from dd.rules.line_search.settings import chooses_rate
from dd.runs.fit import Fit
from dd.runs.optimizer_list import resolve_optimizers
from dd.runs.results import Results
from dd.support.checks import check_count
from dd.support.device import choose_device
from dd.support.files import remove_scratch
from dd.support.folder_lock import FolderLocked, folder_lock_of
from dd.tracking.console import ProgressDisplay
from dd.tracking.history import Record
from dd.tracking.wandb_session import WandbSession, check_settings
from dd.training.joint_optimizer import tracker_of
from dd.training.launch import Processes, process_group
from dd.training.loop import Schedule, TrainingStopped, train
from dd.training.stability import EdgeWatch
from dd.trials.results import Trials

__all__ = ["Experiment"]

UNTESTED = (
    "there are no test samples: reported is what each optimizer says of its error on new data, for "
    "plain ones their training error, which is no estimate of it"
)


@dataclass
class Experiment(Output):
    """Optimizers side by side: same data, same initial weights, trial after trial.

    Attributes:
        moves_aside: whether a folder that holds another run makes this one take the next of its
            name, ``..._2``.
        on_read: is called with what was read of a user's files before anything is trained on it.

    Raises:
        ValueError: if the configuration asks for what cannot be.
    """

    moves_aside: bool = False
    on_read: Callable[[Mapping[str, Any]], None] | None = field(init=False, default=None)
    _checkpoint: Checkpoint | None = field(init=False, default=None)
    _has_begun: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        validate(self.config)
        self.processes = Processes()
        self.config, left_out = resolve_optimizers(self.config, self.processes.size)
        tracking = self.config.tracking
        self.schedule = Schedule(
            self.config.steps, tracking.record_every, tracking.checkpoint_every
        )
        check_count("tracking.record_every_auto", tracking.record_every_auto)
        self.schedule_auto = replace(self.schedule, record_every=tracking.record_every_auto)
        check_settings(tracking.wandb)
        self.device = choose_device(self.processes.device(self.config.device))
        if self.kept is None:
            self.results = Results(token=first_token(self.folder))
        else:
            self.results = Results.restored(self.kept["run"])
            self.results.note(changed_versions(self.kept["origin"]))
        self.results.note(left_out)

    def run(self) -> None:
        """Train, and write the run folder; what was recorded is written even after an error.

        Raises:
            FolderLocked: if the folder holds another run, or its run is still going on.
            FileNotFoundError: if the data set is missing.
            OSError: if the folder cannot be written.
            RuntimeError: if the data set is damaged, or the tracking cannot start.
            ValueError: if a part of the configuration is out of range, or the checkpoint is not of
                this configuration.
        """
        for number in itertools.count(2):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._run_alone()
            except FolderLocked:
                if not self.moves_aside:
                    raise
                name = self.folder.name if number == 2 else self.folder.name.rpartition("_")[0]
                self.folder = self.folder.with_name(f"{name}_{number}")
            else:
                return

    def _run_alone(self) -> None:
        with folder_lock_of(self.folder):
            if self.kept is None:
                self._claim_folder()
            else:
                remove_scratch(self.folder)
            with process_group(self.processes, self.device):
                self._run()

    def _run(self) -> None:
        display = ProgressDisplay() if self.config.tracking.progress else None
        try:
            self.wandb = WandbSession.of_settings(
                self.config.tracking.wandb, self.config.name, self.folder, self.results.token
            )
            self.wandb.settle()
            with display or nullcontext():
                self._train_all(display)
            if self.config.theory and self.processes.leads:
                self._predict()
        except BaseException:
            # On a full disk this fails too, and the first error says more. A run that could not go
            # on leaves its folder as it was.
            written = (self._write_results, self._draw, self._write_report)
            for write in written if self.kept is None or self._has_begun else ():
                with suppress(OSError):
                    write()
            raise
        self._write_results(finished=True)
        try:
            self._draw(finished=True)
            self._compare()
        finally:
            self._write_report(finished=True)

    def _train_all(self, display: ProgressDisplay | None) -> None:
        first = 0 if self.kept is None else self.kept["trial"]
        groups = batchable_groups(self.config, self.processes.size)
        if first > 0:
            groups = [group for group in groups if not self._left(group)]
        for trial in range(first, self.config.trials):
            batched = {name for group in groups for name in group.names} if trial else set()
            # All are built before one is trained, so that a wrong setting costs no training.
            names = [name for name in self.config.optimizers if name not in batched]
            for job in list(self._jobs(trial, names)):
                self._run_job(job, display)
            if trial == 0:
                groups = [group for group in groups if self._ran_together(group, display)]

    def _left(self, group: BatchedTrials) -> list[int]:
        """Trials after the first that a group has not been through."""
        return [
            trial
            for trial in range(1, self.config.trials)
            if not all(self._is_through(name, trial) for name in group.names)
        ]

    def _ran_together(self, group: BatchedTrials, display: ProgressDisplay | None) -> bool:
        """Train a group in all trials after the first; False where they have to go one by one.

        Raises:
            TypeError: if what some trials allowed, another one does not.
            ValueError: likewise.
        """
        left = self._left(group)
        if not left:
            return True
        try:
            self._run_together(group, left, display)
        except (TypeError, ValueError) as error:
            if len(self._left(group)) < len(left):
                raise
            self.results.note([f"{', '.join(group.names)} ran one trial at a time: {error}"])
            return False
        return True

    def _run_together(
        self, group: BatchedTrials, left: list[int], display: ProgressDisplay | None
    ) -> None:
        """Train a group in the trials left, and keep what each chunk of them found."""
        self._has_begun = True
        last = self.config.trials
        label = f"trials {left[0] + 1} to {last}" if len(left) > 1 else f"trial {last}"
        verb = "were computed at once" if len(left) > 1 else "was batched"
        task = display.start(label, label, len(left)) if display else None
        started = time.perf_counter()
        with collected_warnings_of() as sentences:
            for trials, found in group.chunks(left, self.device):
                self._take(group, trials, found)
                if display is not None and task is not None:
                    record = self.history.records[-1]
                    display.update(task, record, completed=trials[-1] + 1 - left[0])
        spent = time.perf_counter() - started
        self.results.note(sentences)
        self.results.note(
            [
                f"{', '.join(group.names)}: {label} {verb}, in {spent:.1f} s; "
                "seconds and steps per second are those of the first trial (together=false: one by "
                "one)"
            ]
        )
        self._note_progress()

    def _take(self, group: BatchedTrials, trials: Sequence[int], found: Trials) -> None:
        for row, trial in enumerate(trials):
            for name in group.names:
                records = records_of(name, trial, found, row)
                self.results.doubt(name, trial, doubts_in(name, self.config.seed + trial, found))
                failure = failure_of(name, self.config.seed + trial, found)
                if failure is None:
                    samples = self.results.num_train
                    fit = Fit(passes=self.config.steps, samples=samples)
                    self.results.complete(name, trial, fit)
                else:
                    self.results.fail(f"{self._label(name, trial)}: {failure}")
                self._log(name, trial, records)
        self._note_progress()
        self._write_results()

    def _note_progress(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.note(self.results.state_dict())

    def _is_through(self, name: str, trial: int) -> bool:
        return self.results.is_through(name, trial, self._label(name, trial))

    def _log(self, name: str, trial: int, records: Sequence[Record]) -> None:
        config = with_seed(self.config, self.config.seed + trial)
        with self._tracker(config, name, trial, resumes=self.kept is not None) as tracker:
            for record in records:
                self.history.append(record)
                tracker.log(record)
            tracker.summarise(self.results.findings(name, trial))

    def _label(self, name: str, trial: int) -> str:
        """An optimizer and trial to the user."""
        trials = self.config.trials
        return name if trials == 1 else f"{name} {trial + 1}/{trials}"

    def _predict(self) -> None:
        split = make_split(with_seed(self.config, self.config.seed))
        progress = self.config.tracking.progress
        self.theory, notes = predicted(self.config, split, self.device, progress=progress)
        self.results.note([*notes, *deviations(self.theory, self.history)])

    def _jobs(self, trial: int, names: list[str]) -> Iterator[Job]:
        """Those of some optimizers of a trial that are not yet through."""
        if not names:
            return
        config = with_seed(self.config, self.config.seed + trial)
        split = make_split(config)
        kept = self.kept if self.kept is not None and self.kept["trial"] == trial else None
        origin = origin_of(self.config, split) if kept is None else kept["origin"]
        if kept is not None:
            require_same_data(origin, split, _source(config))
        elif self.kept is not None:
            # Of a later trial the data alone are its own.
            origin = {**self.kept["origin"], "data": origin["data"]}
        split = split.to(self.device)
        if config.theory:
            check_theory(config, split)
        self.results.num_train = len(split.train_targets)
        if split.reading is not None:
            self._take_reading(split.reading)
        if not split.is_tested:
            self.results.note([UNTESTED])
        names, left_out = followed(config, names, split)
        self.results.note(left_out)
        initial = make_model(config, split)
        states = {} if kept is None else kept["optimizers"]
        self._checkpoint = Checkpoint(self.folder / "checkpoint.pt", trial, origin, states)
        for name in names if kept is None else names[names.index(kept["optimizer"]) :]:
            # What was chosen among candidates is kept only when it is through.
            if make_selection(config, name) is None or not self._is_through(name, trial):
                state = states.get(name)
                checkpoint = self._checkpoint
                yield build_job(
                    name, trial, config, initial, split, checkpoint=checkpoint, kept=state
                )

    def _take_reading(self, reading: Reading) -> None:
        """Take down what was read in the first trial, and what was doubtful in any."""
        self.results.note(reading.doubts)
        if not self.results.data:
            self.results.data = reading.as_dict()
            if self.on_read is not None and self.processes.leads:
                self.on_read(self.results.data)

    def _run_job(self, job: Job, display: ProgressDisplay | None) -> None:
        self._has_begun = True
        label = self._label(job.name, job.trial)
        with collected_warnings_of() as sentences:
            recorder = self._recorder(job, display, sentences)
            try:
                chosen_among = make_search(job, self.schedule)
                with recorder.tracker:
                    recorder.log_again()
                    if chosen_among is None:
                        self._train(job, recorder)
                    else:
                        self._choose(chosen_among, recorder)
            except TrainingStopped as error:
                self.results.fail(f"{label}: {error}")
                recorder.doubt()
            finally:
                tracker = tracker_of(job.optimizer)
                if tracker is not None:
                    self.noise.setdefault(job.name, str(tracker.noise))
        # What is said of the sizes is the same in every trial.
        self.results.note([f"{job.name}: {sentence}" for sentence in [*job.told, *sentences]])
        if recorder.edge.crossing is not None:
            self.results.note([f"{label}: {recorder.edge.crossing}"])

    def _recorder(
        self, job: Job, display: ProgressDisplay | None, sentences: list[str]
    ) -> Recorder:
        split, model, optimizer = job.split, job.model, job.optimizer
        recorder = Recorder(
            name=job.name,
            trial=job.trial,
            results=self.results,
            tracker=self._tracker(job.config, job.name, job.trial, resumes=self.kept is not None),
            checkpoint=job.checkpoint,
            write=self._write_results,
            edge=EdgeWatch(model, optimizer, split.train_inputs, split.train_targets),
            optimizer=optimizer,
            sentences=sentences,
            display=display,
            setup=job.setup,
            task=display.start(job.name, self._label(job.name, job.trial), self.schedule.steps)
            if display
            else None,
        )
        if job.kept is not None:
            recorder.restore(job.kept["progress"], optimizer)
        return recorder

    def _train(self, job: Job, recorder: Recorder) -> None:
        kept = -1 if job.kept is None else job.kept["step"]
        stops = chooses_rate(job.optimizer)
        train(
            job.model,
            job.optimizer,
            job.split,
            self.schedule_auto if stops else self.schedule,
            recorder,
            job.batches,
            kept=kept,
            processes=self.processes,
        )
        recorder.finish(ends_at_best=stops)

    def _choose(self, chosen_among: HyperparameterSearch, recorder: Recorder) -> None:
        label = self._label(recorder.name, recorder.trial)
        if recorder.display is not None:
            recorder.task = recorder.display.start(recorder.name, label, chosen_among.most_steps)
        chosen_among.shown = recorder.show
        try:
            chosen = chosen_among.choose(recorder.setup)
        except TrainingStopped:
            recorder.take_first()
            raise
        if chosen.diverged:
            self.results.note(
                [f"{label}: candidates diverged and were left out: {rates(chosen.diverged)}"]
            )
        if chosen.doubted:
            self.results.note(
                [
                    f"{label}: candidates whose error is not to be believed were left out: "
                    f"{rates(chosen.doubted)}"
                ]
            )
        recorder.take(chosen)


def _source(config: DictConfig) -> str:
    """Where the data come from, to the user."""
    path = config.data.get("path")
    return config.data["_target_"] if path is None else f"data.path={path}"
