"""Optimizers followed by dd.decouple in experiments, beside their plain selves."""

import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F

from dd.baselines.muon import muon
from dd.data import xor
from dd.experiments.assembly import make_model, make_optimizer, make_split
from dd.experiments.batched_trials import batchable_groups
from dd.report.page import write_report
from dd.runs.optimizer_list import resolve_optimizers
from dd.sweep.job import objective_of
from dd.tracking import figures
from dd.training.joint_optimizer import JointOptimizer, tracker_of
from tests.composed import QUICK, composed, ran

PLAIN = ["adamw", "muon", "schedulefree"]
FOLLOWED = ["dd_adamw", "dd_muon", "dd_schedulefree"]
# Enough inputs for a regression to be relied on, and steps to over-fit in.
SMALL = [
    *QUICK,
    *("data.dimension=60", "data.num_train=240", "data.num_test=300"),
    *("steps=12", "components=known"),
]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(figures, "train_vs_test", lambda history, path, *rest: path.touch())


def run(folder, *overrides):
    return ran(folder, "experiment=xor", *SMALL, *overrides)


def listed(names):
    return f"optimizers=[{','.join(names)}]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "train_vs_test", lambda history, path, *rest: path.touch())
        return run(tmp_path_factory.mktemp("runs") / "run", listed([*PLAIN, *FOLLOWED]))


# --- What a run has of them ------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_followed_optimizer_has_all_that_a_decoupled_one_has(finished, name):
    own = finished.summary[name]
    assert finished.noise[name].startswith("noise model")
    assert own["final_error_lower"] < own["final_train_error"] < own["final_error_upper"]
    assert own["completed_trials"] == 1
    assert "doubts" not in own
    last = finished.history.select(name, 0)[-1]
    assert last.train_loss != last.uncorrected_train_loss


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_one_is_plain(finished, name):
    assert name not in finished.noise
    assert "final_error_lower" not in finished.summary[name]
    for record in finished.history.select(name, 0):
        assert record.train_loss == record.uncorrected_train_loss


def test_both_start_alike_and_part_with_the_first_step(finished):
    for plain, followed in zip(PLAIN, FOLLOWED, strict=True):
        first, second = (finished.history.select(name, 0) for name in (plain, followed))
        assert first[0].test_loss == second[0].test_loss
        assert first[-1].test_loss != second[-1].test_loss


def test_the_report_tells_what_is_tracked(finished):
    page = write_report(finished.folder).read_text(encoding="utf-8")
    for label in ("AdamW", "Muon", "Sched.-Free"):
        assert f"{label} + DD" in page
    assert page.count("its tracked error on all training samples") >= 3


def test_their_gaps_are_sampling_errors_and_those_of_plain_ones_are_not(tmp_path):
    sizes = ["data.dimension=300", "data.num_train=1200", "data.num_test=4000", "steps=60"]
    whole = [f"available.{name}.batch_size=null" for name in [*PLAIN, *FOLLOWED]]
    found = run(tmp_path / "run", listed([*PLAIN, *FOLLOWED]), *sizes, *whole).summary
    # The mean distance of two error rates of at most a half, over records that go together.
    sampling = 3 * math.sqrt(2 / math.pi) * math.sqrt(0.25 / 1200 + 0.25 / 4000)
    for plain, followed in zip(PLAIN, FOLLOWED, strict=True):
        assert found[followed]["mean_error_gap"] < sampling, followed
        assert found[plain]["mean_error_gap"] > 2 * sampling, plain


# --- How they are built ----------------------------------------------------------------------


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(n, n - 1) for n in (5, 4, 3)))
    first, second = muon(model.parameters(), lr=0.1, adamw={"lr": 0.01})
    assert [type(each) for each in (first, second)] == [torch.optim.Muon, torch.optim.AdamW]
    held = [[p for g in each.param_groups for p in g["params"]] for each in (first, second)]
    assert [tuple(p.shape) for p in held[0]] == [(4, 5), (3, 4)]
    assert [tuple(p.shape) for p in held[1]] == [(4,), (3,), (2, 3), (2,)]
    assert (first.param_groups[0]["lr"], second.param_groups[0]["lr"]) == (0.1, 0.01)


def test_steps_of_several_are_their_own_steps():
    def built():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2))
        return model, muon(model.parameters(), lr=0.1, adamw={"lr": 0.01})

    inputs, targets = torch.randn(6, 5), torch.tensor([0, 1, 0, 1, 0, 1])
    (model, parts), (other, own) = built(), built()
    joint = JointOptimizer(parts)

    def closure():
        joint.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(3):
        joint.step(closure)
        for optimizer in own:
            optimizer.zero_grad()
        F.cross_entropy(other(inputs), targets).backward()
        for optimizer in own:
            optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("override", "estimator"),
    [
        ([], {"dd_adamw": "Stein", "dd_muon": "Probe", "dd_schedulefree": "Stein"}),
        (["components=known"], {"dd_muon": "Stein"}),
        (["available.dd_adamw.decouple.curvature=probe"], {"dd_adamw": "Probe"}),
    ],
)
def test_regressions_are_told_the_components(override, estimator):
    config = composed("experiment=xor", *QUICK, *override)
    split = make_split(config)
    for name, wanted in estimator.items():
        model = make_model(config, split)
        tracker = tracker_of(make_optimizer(config, name, model, split))
        assert type(tracker._attachment.estimator).__name__ == wanted


# --- Schedule-Free ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["schedulefree", "dd_schedulefree"])
def test_looks_change_nothing_and_the_average_is_handed_over(name, tmp_path):
    # Shadows of samples that are absent are brought up to date, and rounded, by a look.
    words = [listed([name]), f"available.{name}.batch_size=null"]
    often = run(tmp_path / "a", *words, "tracking.record_every=1")
    seldom = run(tmp_path / "b", *words, "tracking.record_every=12")
    for record in seldom.history.records:
        (same,) = (r for r in often.history.records if r.step == record.step)
        assert same == record
    kept = torch.load(often.folder / "checkpoint.pt", weights_only=True)
    model = make_model(often.config, split := make_split(often.config))
    model.load_state_dict(kept["optimizers"][name]["model"])
    with torch.no_grad():
        wrong = model.eval()(split.test_inputs).argmax(1) != split.test_targets
    assert float(wrong.double().mean()) == often.summary[name]["final_test_error"]


# --- Trials, sweeps, choices -----------------------------------------------------------------


def test_trials_go_one_by_one_and_are_runs_of_consecutive_seeds(tmp_path):
    names = ["gd", "dd_adamw", "dd_muon"]
    config = composed("experiment=xor", *SMALL, listed([*names, "dd"]), "trials=2")
    assert [group.names for group in batchable_groups(config, 1)] == [("gd", "dd")]
    both = run(tmp_path / "both", listed(names), "trials=2")
    second = run(tmp_path / "second", listed(names[1:]), "seed=1")
    for name in names[1:]:
        pairs = zip(both.history.select(name, 1), second.history.select(name, 0), strict=True)
        for one, other in pairs:
            assert one.test_loss == other.test_loss
            assert one.train_loss == other.train_loss


def test_sgd_that_is_followed_is_no_batched_trial():
    followed = "+available.gd.decouple={curvature: auto}"
    config = composed("experiment=xor", *SMALL, "optimizers=[gd,dd]", "trials=3", followed)
    assert [group.names for group in batchable_groups(config, 1)] == [("dd",)]


def test_a_search_takes_its_tracked_loss():
    config = composed("experiment=xor", "optimizers=[gd,adamw,dd_muon,dd_adamw]")
    assert objective_of(config) == "dd_muon"
    with pytest.raises(ValueError, match="adamw is plain"):
        objective_of(composed("experiment=xor", "optimizers=[dd_adamw,adamw]", "objective=adamw"))


def test_candidates_may_be_chosen_by_its_tracked_error(tmp_path):
    grid = "{by:tracked,folds:2,lr_factors:[0.3,1],weight_decays:[0]}"
    found = run(tmp_path / "a", listed(["dd_adamw"]), f"+available.dd_adamw.selection={grid}")
    own = found.summary["dd_adamw"]
    assert own["chosen_lr"] in (0.3 * 0.001, 0.001)
    assert own["samples"] == 240
    with pytest.raises(ValueError, match="no estimate of the test error"):
        run(tmp_path / "b", listed(["adamw"]), f"+available.adamw.selection={grid}")


# --- What is doubtful ------------------------------------------------------------------------


def test_a_response_that_is_known_poorly_is_noted_and_not_believed(tmp_path):
    probed = "available.dd_adamw.decouple.curvature=probe"
    found = run(tmp_path / "run", listed(["dd_adamw"]), "components=none", probed)
    assert any(n.startswith("dd_adamw: AdamW acts on every weight by") for n in found.notes)
    assert found.summary["dd_adamw"]["doubts"]
    said = json.loads((found.folder / "summary.json").read_text())
    assert said["dd_adamw"]["doubts"] == found.summary["dd_adamw"]["doubts"]
    assert "not to be believed" in write_report(found.folder).read_text(encoding="utf-8")


def test_what_is_warned_of_at_building_is_noted_too(tmp_path):
    other = ["available.dd_adamw._target_=torch.optim.Rprop", "~available.dd_adamw.weight_decay"]
    found = run(tmp_path / "run", listed(["dd_adamw"]), *other)
    assert any("Rprop is followed coarsely" in note for note in found.notes)
    assert found.summary["dd_adamw"]["doubts"]


def _narrow(tmp_path, columns):
    features = xor(dimension=8, num_train=90, num_test=1, seed=0).train_inputs[:, :columns]
    lines = [
        ",".join(f"{v:.6f}" for v in row) + f",{i % 2}" for i, row in enumerate(features.tolist())
    ]
    path = tmp_path / "table.csv"
    path.write_text("\n".join([",".join([*"abcdefgh"[:columns], "label"]), *lines, ""]))
    return ["experiment=probe", f"data.path={path}", "steps=6", "tracking.progress=false"]


QUIET = ["tracking.wandb.mode=disabled", "correct_head=false"]


def test_tables_too_narrow_to_follow_on_are_left_to_others(tmp_path):
    words = [*_narrow(tmp_path, 7), *QUIET, "optimizers=[dd,adamw,dd_adamw,dd_muon]"]
    found = ran(tmp_path / "run", *words)
    assert found.history.optimizers == ["dd", "adamw"]
    left = [note for note in found.notes if "was left out" in note]
    assert [note.split()[0] for note in left] == ["dd_adamw", "dd_muon"]
    assert "8 inputs or more, and these data have 7" in left[0]


def test_where_none_is_left_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['dd_muon'\] cannot be trained: .* 8 inputs or more"):
        ran(tmp_path / "run", *_narrow(tmp_path, 7), *QUIET, "optimizers=[dd_muon]")


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_narrowest_table_is_followed(tmp_path, name):
    found = ran(tmp_path / "run", *_narrow(tmp_path, 8), *QUIET, f"optimizers=[{name}]")
    assert found.summary[name]["completed_trials"] == 1


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizers=[dd_adam]", "optimizers must list some of .*dd_adamw"),
        ("available.dd_adamw.lr=fast", "lr of optimizer dd_adamw must be a number"),
        ("available.dd_adamw.lr=auto", "only decoupled descent chooses its own steps"),
        ("available.dd_muon.lr=-1", "lr of optimizer dd_muon"),
        ("available.dd_muon.adamw.lr=fast", "adamw.lr of optimizer dd_muon"),
        ("available.dd_muon.adamw=3", "adamw of optimizer dd_muon must be a group of settings"),
        ("available.dd_muon.decouple=true", "decouple of optimizer dd_muon must be a group"),
        ("available.dd_muon.batch_size=0", "batch_size of optimizer dd_muon"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", listed(FOLLOWED), override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+available.dd_adamw.speed=3", "the settings of optimizer dd_adamw do not fit"),
        ("+available.dd_adamw.decouple.speed=3", "the settings of optimizer dd_adamw do not fit"),
        ("available.dd_adamw.decouple.curvature=best", "curvature"),
        ("+available.dd_adamw.decouple.head=auto", 'head="auto" is for dd.DecoupledDescent'),
        ("+available.dd_adamw.differentiable=true", "differentiable=True"),
    ],
)
def test_bad_parts_are_refused_before_anything_is_trained(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "optimizers=[adamw,dd_adamw]", override)
    assert not (tmp_path / "run" / "history.csv").exists()


def test_an_optimizer_that_no_rule_follows_is_refused(tmp_path):
    followed = "+available.lbfgs.decouple={curvature: auto}"
    with pytest.raises(ValueError, match="LBFGS cannot be followed"):
        run(tmp_path / "run", "optimizers=[lbfgs]", followed)


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *r: None if n == "schedulefree" else find(n, *r)
    )
    config = composed("experiment=xor", "optimizers=[gd,dd_schedulefree]")
    with pytest.raises(ValueError, match=r"dd_schedulefree cannot .*: pip install schedulefree"):
        resolve_optimizers(config, 1)
    assert resolve_optimizers(composed("experiment=xor"), 1)[1] == []


def test_a_torch_without_muon_is_told(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RuntimeError, match=r"pip install 'torch>=2\.9'"):
        run(tmp_path / "run", "optimizers=[gd,muon]")
    assert not (tmp_path / "run" / "history.csv").exists()


def test_processes_have_no_batches_of_their_own():
    config = composed("experiment=xor", "optimizers=[dd_adamw]")
    with pytest.raises(ValueError, match="batches and candidates of its own need one process"):
        resolve_optimizers(config, 2)
    whole = composed(
        "experiment=xor", "optimizers=[dd_adamw]", "available.dd_adamw.batch_size=null"
    )
    assert resolve_optimizers(whole, 2)[1] == []
