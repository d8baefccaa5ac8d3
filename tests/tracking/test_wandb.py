"""Weights & Biases, read back from the files of offline runs; a server that is not there."""

import gc
import http.server
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from dd.experiments.output import first_token
from dd.sweep.job import SweepJob
from dd.tracking.console import METHOD_COLUMNS
from dd.tracking.history import METRICS, Record
from dd.tracking.wandb_logging import WandbRun
from dd.tracking.wandb_server import answers
from dd.tracking.wandb_session import WandbSession, check_settings, group_of
from tests.composed import ran

REPOSITORY = Path(__file__).parents[2]
NAN = float("nan")
SMALL = [
    "experiment=xor",
    "data.num_train=100",
    "data.num_test=80",
    "data.dimension=20",
    "steps=4",
    "tracking.progress=false",
]


def record(step=0, *, train=(0.5, 0.4)):
    """Return a record; train is (loss, error)."""
    return Record("dd", 0, step, train[0], 0.6, train[1], 0.3, 0.1, 0.2)


def transaction_log(path):
    """Yield the records of an offline run, stored as a LevelDB log after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data, position, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if position > len(data):
            return
        if kind in (1, 4):
            yield WandbRecord.FromString(b"".join(parts))
            parts = []


def logged(folder, name="*"):
    """Return the records of one run in a folder, by type, once its last one is on disk.

    wandb's service process may still be writing for a moment after ``finish`` has returned.
    """
    (path,) = folder.glob(f"wandb/*run-*-{name}/*.wandb")
    deadline = time.monotonic() + 30
    found = {}
    while "exit" not in found and time.monotonic() < deadline:
        time.sleep(0.02)
        found = {}
        for entry in transaction_log(path):
            kind = entry.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(entry, kind))
    return found


def values(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a run in a folder of its own, with a home that holds no credentials."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)

    def build(mode="offline", **changes):
        arguments = {
            "directory": tmp_path / "run",
            "project": "decoupled-descent",
            "name": "dd-2",
            "job_type": "dd",
            "group": "xor/run",
            "tags": ["xor", "decoupled"],
            "config": {"data": {"dimension": 1000}, "seed": 0},
            "run_id": "0123-dd-2",
        }
        return WandbRun(mode=mode, **{**arguments, **changes})

    return build


def test_offline_run_holds_metrics_group_and_config(start, tmp_path):
    made = [record(step=step, train=(0.5 / (1 + step), 0.25)) for step in (0, 10, 20)]
    with start() as run:
        for item in made:
            run.log(item)
        run.summarise({"mean_error_gap": 0.0125})
    found = logged(tmp_path / "run")

    header = found["run"][0]
    assert header.project == "decoupled-descent"
    assert header.run_group == "xor/run"
    assert (header.display_name, header.job_type) == ("dd-2", "dd")
    assert header.run_id == "0123-dd-2"
    assert list(header.tags) == ["xor", "decoupled"]
    config = values(header.config.update)
    assert config["data"] == {"dimension": 1000}
    assert config["seed"] == 0

    rows = [values(entry.item) for entry in found["history"]]
    assert [row["step"] for row in rows] == [0, 10, 20]
    for row, item in zip(rows, made, strict=True):
        assert {name: row[name] for name in METRICS} == {
            name: getattr(item, name) for name in METRICS
        }

    steps = {metric.name or metric.glob_name: metric.step_metric for metric in found["metric"]}
    assert steps["*"] == "step"
    assert "step" in steps
    summary = {}
    for entry in found["summary"]:
        summary.update(values(entry.update))
    assert summary["mean_error_gap"] == 0.0125
    assert [entry.exit_code for entry in found["exit"]] == [0]


def test_run_that_raised_is_closed_as_failed(start, tmp_path):
    with pytest.raises(FloatingPointError), start() as run:  # noqa: PT012
        run.log(record(train=(NAN, 1.0)))
        raise FloatingPointError
    found = logged(tmp_path / "run")
    assert [entry.exit_code for entry in found["exit"]] == [1]
    assert math.isnan(values(found["history"][0].item)["train_loss"])


def test_offline_run_carries_nothing_but_what_was_logged(start, tmp_path, capfd):
    with start() as run:
        run.log(record())
    folder = tmp_path / "run"
    found = logged(folder)
    assert not found["run"][0].host
    assert not found["run"][0].HasField("git")
    assert not {"environment", "stats", "output", "output_raw", "artifact"} & set(found)
    files = [p.name for p in folder.glob("wandb/*/files/**/*") if p.is_file()]
    assert files == []
    assert capfd.readouterr() == ("", "")


def test_disabled_run_needs_no_wandb_and_leaves_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with start("disabled") as run:
        run.log(record())
        run.summarise({"mean_error_gap": 0.1})
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_not_installed_is_named(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match=r"pip install 'decoupled-descent\[experiments\]'"):
        start("offline").__enter__()


def test_online_without_credentials_names_the_remedy(start):
    with pytest.raises(RuntimeError, match="wandb login") as caught, start("online"):
        pass
    message = str(caught.value)
    assert "WANDB_API_KEY" in message
    assert "tracking.wandb.mode=offline" in message
    assert "\n" not in message


# --- The runs of an experiment ----------------------------------------------------------------


def ran_small(folder, *overrides):
    return ran(folder, *SMALL, *overrides)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment logged offline, in the folder that the command would give it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("WANDB_MODE", raising=False)
        folder = tmp_path_factory.mktemp("outputs") / "xor" / "2026-01-31_12-00-00_0"
        return ran_small(
            folder,
            "optimizers=[gd,dd]",
            "trials=2",
            "together=false",
            "tracking.wandb.tags=[mine]",
            "tracking.wandb.entity=us",
        )


def test_offline_is_the_default(experiment):
    assert experiment.wandb.mode == "offline"
    names = [path.name for path in (experiment.folder / "wandb").glob("*run-*")]
    assert len([name for name in names if name.startswith("offline-run-")]) == 5


def test_all_runs_share_group_metrics_and_axis(experiment):
    headers, keys = {}, set()
    for name in ("gd-0", "gd-1", "dd-0", "dd-1"):
        found = logged(experiment.folder, name)
        headers[name] = found["run"][0]
        keys.add(tuple(sorted(values(found["history"][0].item))))
        steps = {m.name or m.glob_name: m.step_metric for m in found["metric"]}
        assert steps["*"] == "step"
    assert len(keys) == 1
    assert {"train_error", "test_error", "train_loss", "test_loss"} <= set(keys.pop())
    assert {h.run_group for h in headers.values()} == {"xor/2026-01-31_12-00-00_0"}
    assert {name: h.display_name for name, h in headers.items()} == {name: name for name in headers}
    assert {h.job_type for h in headers.values()} == {"gd", "dd"}
    assert {h.entity for h in headers.values()} == {"us"}
    assert {"xor", "gd", "plain", "mine"} <= set(headers["gd-0"].tags)
    assert {"xor", "dd", "decoupled", "mine"} <= set(headers["dd-1"].tags)
    assert len({h.run_id for h in headers.values()}) == 4


def test_summary_of_a_run_has_the_figures_of_its_trial(experiment):
    found = logged(experiment.folder, "dd-1")
    summary = {}
    for entry in found["summary"]:
        summary.update(values(entry.update))
    own = experiment.summary["dd"]["per_trial"][1]
    for key in ("reported_error", "reported_gap", "mean_error_gap", "final_test_error"):
        assert summary[key] == own[key]


def test_comparison_holds_curves_of_all_the_picture_and_the_table(experiment):
    found = logged(experiment.folder, "comparison")
    header = found["run"][0]
    assert (header.job_type, header.run_group) == ("comparison", "xor/2026-01-31_12-00-00_0")
    (folder,) = experiment.folder.glob("wandb/offline-run-*-comparison")
    picture = next(folder.glob("files/media/images/curves*.png"))
    assert picture.read_bytes() == experiment.figure.read_bytes()

    table = json.loads(next(folder.glob("files/media/table/methods*.json")).read_text())
    assert table["columns"] == ["optimizer", *(label for label, _, _ in METHOD_COLUMNS)]
    assert [row[0] for row in table["data"]] == ["gd", "dd"]
    assert table["data"][1][2] == experiment.summary["dd"]["reported_error"]

    curves = json.loads(next(folder.glob("files/media/table/error*.json")).read_text())
    lines = {row[curves["columns"].index("lineKey")] for row in curves["data"]}
    assert lines == {"gd train", "gd test", "dd train", "dd test"}

    summary = {}
    for entry in found["summary"]:
        summary.update(values(entry.update))
    assert summary["dd/reported_gap"] == experiment.summary["dd"]["reported_gap"]


def test_a_resumed_experiment_goes_on_with_its_ids(tmp_path):
    session = WandbSession("offline", "xor", tmp_path, "project", None, (), "0123")
    first, again = (
        session.run("dd-1", job_type="dd", config={}, resumes=resumes)._about["id"]
        for resumes in (False, True)
    )
    assert first == again == "0123-dd-1"


def test_groups_of_different_folders_differ(tmp_path):
    root = tmp_path / "outputs" / "xor"
    assert group_of("xor", root / "2026_0") == "xor/2026_0"
    assert group_of("xor", root / "2026_sweep" / "0_0") == "xor/2026_sweep/0_0"
    first, other = (group_of("xor", tmp_path / name / "run") for name in ("a", "b"))
    assert first != other
    assert first.startswith("xor/run-")
    long = [group_of("xor", root / ("s" * 200) / name) for name in ("0_0", "1_0")]
    assert long[0] != long[1]
    assert all(len(group) == 128 for group in long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mode": "dryrun"},
            r"mode must be one of online, offline, disabled, or null, got 'dryrun'",
        ),
        ({"project": "a/b"}, r"project must be a name without"),
        ({"project": ""}, r"project must be a name"),
        ({"entity": 3}, r"entity must be a user or team, or null, got 3"),
        ({"tags": "mine"}, r"tags must list texts"),
        ({"tags": ["x" * 65]}, r"texts of 1 to 64 characters"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_settings({"mode": "offline", "project": "p", "entity": None, "tags": [], **change})


# --- A server that is not there ---------------------------------------------------------------


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that knows nothing."""

    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def silent():
    """Address of a socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_any_answer_is_an_answer():
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert answers(f"http://127.0.0.1:{server.server_port}", 30)


def test_nobody_and_silence_are_none(silent):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert not answers(closed, 30)
    assert not answers(silent, 0.1)
    assert not answers("ftp://127.0.0.1", 0.1)
    assert not answers("http://", 0.1)


def test_a_silent_server_costs_no_run(silent, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("dd.tracking.wandb_session.server_address", lambda: silent)
    experiment = ran_small(tmp_path / "run", "optimizers=[gd]", "tracking.wandb.mode=online")
    (note,) = [note for note in experiment.notes if "does not answer" in note]
    assert silent in note
    assert f"`cd {tmp_path / 'run'} && wandb sync --include-online`" in note
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert note in summary["notes"]
    assert values(logged(tmp_path / "run", "gd")["history"][-1].item)["step"] == 4


def test_a_server_lost_at_the_end_is_given_up(start):
    class Lost:
        def finish(self, exit_code):
            raise TimeoutError

    reasons = []
    run = start("online", give_up=lambda *said: reasons.append(said))
    run._run = Lost()
    run.__exit__(None, None, None)
    assert reasons == [("the Weights & Biases server stopped answering", "offline")]


def test_a_comparison_that_the_server_does_not_take_ends_nothing(start):
    class Puzzled:
        def log(self, row):
            raise ValueError("field required")

    reasons = []
    run = start("online", give_up=lambda *said: reasons.append(said))
    run._run = Puzzled()
    run.show(lambda wandb: {"methods": 1})
    said = "the Weights & Biases server did not take the comparison (field required)"
    assert reasons == [(said, "offline")]


def test_a_session_that_gave_up_starts_runs_offline(tmp_path):
    session = WandbSession("online", "xor", tmp_path, "project")
    assert session.run("gd", job_type="gd", config={}).mode == "online"
    session.give_up("the server stopped answering")
    assert session.run("dd", job_type="dd", config={}).mode == "offline"
    assert len(session.notes) == 1


# --- Its own process is gone ------------------------------------------------------------------


def helpers():
    """Processes of wandb that this one has started."""
    found = subprocess.run(  # noqa: S603
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],  # noqa: S607
        capture_output=True,
        text=True,
    ).stdout
    lines = [line for line in found.splitlines() if "wandb-core" in line]
    return [int(line.split()[0]) for line in lines if "defunct" not in line]


def kill_helpers():
    killed = helpers()
    for process in killed:
        os.kill(process, signal.SIGKILL)
    assert killed
    while any(process in killed for process in helpers()):
        time.sleep(0.02)


@pytest.fixture
def dropped():
    """Let wandb drop the handles of processes that it does not know to be gone."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.usefixtures("dropped")
@pytest.mark.parametrize("moment", [0, 2, 4], ids=["before", "amid", "at the end"])
def test_a_run_whose_process_was_killed_is_logged_anew_as_a_whole(start, tmp_path, moment):
    reasons = []
    with start(give_up=lambda *said: reasons.append(said)) as run:
        for step in range(4):
            if step == moment:
                kill_helpers()
            run.log(record(step=step))
        run.summarise({"mean_error_gap": 0.5})
        if moment == 4:
            kill_helpers()
    assert [mode for _, mode in reasons] == ["offline"]
    last = max((tmp_path / "run" / "wandb").glob("*run-*"), key=lambda path: path.stat().st_mtime)
    last.rename(tmp_path / "run" / "wandb" / "offline-run-last-whole")
    found = logged(tmp_path / "run", "whole")
    rows = [values(entry.item) for entry in found["history"]]
    assert [(row["step"], row["_step"]) for row in rows] == [(step, step) for step in range(4)]
    assert [entry.exit_code for entry in found["exit"]] == [0]


@pytest.mark.usefixtures("dropped")
def test_wandb_that_fails_again_and_again_ends_nothing(start, monkeypatch):
    reasons = []
    run = start(give_up=lambda *said: reasons.append(said)).__enter__()
    monkeypatch.setattr(WandbRun, "_init", failing)
    run._run.log = failing
    for step in range(3):
        run.log(record(step=step))
    run.summarise({"mean_error_gap": 0.5})
    run.__exit__(None, None, None)
    assert [mode for _, mode in reasons] == ["offline", "disabled"]


def failing(*arguments, **keywords):
    raise BrokenPipeError("gone")


@pytest.mark.usefixtures("dropped")
def test_a_later_run_that_cannot_be_started_ends_no_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    init, calls = WandbRun._init, 0

    def first_alone(self, *arguments):
        nonlocal calls
        calls += 1
        return init(self, *arguments) if calls == 1 else failing()

    monkeypatch.setattr(WandbRun, "_init", first_alone)
    experiment = ran_small(tmp_path / "run", "optimizers=[gd,sgd]", "tracking.wandb.mode=offline")
    assert experiment.history.optimizers == ["gd", "sgd"]
    assert any("not logged any more" in note for note in experiment.notes)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


# --- The environment --------------------------------------------------------------------------

SETTINGS = {"mode": None, "project": None, "entity": None, "tags": ["mine"]}


def session_of(folder, **settings):
    return WandbSession.of_settings(SETTINGS | settings, "xor", folder, first_token(folder))


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of wandb, and no others."""

    def build(**variables):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(f"WANDB_{name}", value)

    build()
    return build


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"MODE": ""}, "offline"),
        ({"MODE": "online"}, "online"),
        ({"MODE": "dryrun"}, "offline"),
        ({"MODE": "disabled"}, "disabled"),
        ({"DISABLED": "true"}, "disabled"),
        ({"DISABLED": "false", "MODE": "online"}, "online"),
    ],
)
def test_the_mode_is_that_of_the_environment(environment, tmp_path, variables, mode):
    environment(**variables)
    session = session_of(tmp_path)
    assert (session.mode, session.notes) == (mode, [])


def test_variables_mean_what_they_mean_to_wandb(environment, tmp_path):
    environment(
        PROJECT="p",
        ENTITY="us",
        NAME="mine",
        RUN_GROUP="g",
        RUN_ID="abc",
        JOB_TYPE="j",
        TAGS="one, two",
        DIR=str(tmp_path / "logs"),
    )
    session = session_of(tmp_path)
    run = session.run("dd", job_type="dd", config={})
    about = {key: run._about[key] for key in ("project", "entity", "name", "group", "id")}
    assert about == {
        "project": "p",
        "entity": "us",
        "name": "mine-dd",
        "group": "g",
        "id": "abc-dd",
    }
    assert run._about["job_type"] == "j"
    assert run._about["tags"] == ["xor", "mine", "one", "two"]
    assert run.directory == tmp_path / "logs"
    assert session.notes == []


def test_a_setting_wins_over_the_environment_and_says_so(environment, tmp_path):
    environment(MODE="online", PROJECT="p", ENTITY="us")
    session = session_of(tmp_path, mode="offline", project="q", entity="us")
    assert (session.mode, session.project) == ("offline", "q")
    assert session.notes == [
        "tracking.wandb.mode=offline was taken, and not online, which the environment variable "
        "WANDB_MODE says",
        "tracking.wandb.project=q was taken, and not p, which the environment variable "
        "WANDB_PROJECT says",
    ]


def test_a_mode_that_is_none_is_told(environment, tmp_path):
    environment(MODE="of-line")
    with pytest.raises(ValueError, match=r"WANDB_MODE must be one of online, .* got 'of-line'"):
        session_of(tmp_path)


def test_a_mode_that_is_none_leaves_the_folder_for_the_mended_command(environment, tmp_path):
    environment(MODE="of-line")
    for _ in range(2):
        with pytest.raises(ValueError, match="WANDB_MODE must be one of online"):
            ran(tmp_path / "run", *SMALL, "optimizers=[gd]")
    environment(MODE="disabled")
    ran(tmp_path / "run", *SMALL, "optimizers=[gd]")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_jobs_of_a_multirun_have_ids_of_their_own(environment, tmp_path):
    environment(RUN_ID="abc")
    SweepJob(3, {}).write(tmp_path)
    assert first_token(tmp_path) == "abc-3"


def test_what_is_kept_private_is_logged_where_the_environment_asks_for_it(environment, start):
    environment(HOST="here", CONSOLE="wrap", SILENT="true")
    with start() as run:
        settings = run._run.settings
    assert (settings.host, settings.console) == ("here", "wrap")
    assert settings.x_disable_stats


# --- The workspace ----------------------------------------------------------------------------


def workspace(*arguments):
    pytest.importorskip("wandb_workspaces")
    program = REPOSITORY / "scripts" / "wandb_workspace.py"
    return subprocess.run(  # noqa: S603
        [sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=120
    )


def test_workspace_overlays_train_and_test_of_all_runs():
    found = workspace("--entity", "us", "--project", "p", "--json")
    assert found.returncode == 0, found.stderr
    text = json.loads(found.stdout)
    flat = json.dumps(text)
    for key in ("train_error", "test_error", "train_loss", "test_loss", "reported_gap"):
        assert key in flat


def test_workspace_without_a_project_says_so():
    found = workspace("--json")
    assert found.returncode == 2
    assert "--entity" in found.stderr
