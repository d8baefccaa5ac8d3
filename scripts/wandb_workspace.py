"""Build the Weights & Biases workspace that compares optimizers across experiments.

    python scripts/wandb_workspace.py --entity me --project decoupled-descent
    python scripts/wandb_workspace.py --entity me --project decoupled-descent --json   # no server

Train (dashed) and test curves of every run lie over each other, errors and losses apart, runs
grouped by experiment and optimizer; beside them the gap, what each optimizer reports against what
the test set says, and the pictures and tables of the runs ``comparison``. Needs the package
wandb-workspaces: ``uv run --group workspaces python scripts/wandb_workspace.py``.
"""

import argparse
import json
import sys

NAME = "Decoupled descent: train and test"


def build(entity: str, project: str):
    """The workspace, which is not saved."""
    import wandb_workspaces.reports.v2 as parts
    import wandb_workspaces.workspaces as spaces

    def curves(metric: str):
        keys = [f"train_{metric}", f"test_{metric}"]
        return parts.LinePlot(
            title=f"{metric}, train and test",
            x="step",
            y=keys,
            smoothing_factor=0.0,
            max_runs_to_show=100,
            legend_template="${run:displayName} ${metricName}",
        )

    def bars(title: str, *keys: str):
        metrics = [parts.SummaryMetric(key) for key in keys]
        return parts.BarPlot(title=title, metrics=metrics, max_runs_to_show=100)

    pictures = [
        parts.MediaBrowser(title="train and test curves", media_keys=["curves"]),
        parts.WeavePanelSummaryTable(table_name="methods"),
    ]
    return spaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            spaces.Section(
                name="Train and test", panels=[curves("error"), curves("loss")], is_open=True
            ),
            spaces.Section(
                name="Reported and true",
                panels=[
                    bars(
                        "error: reported, on the test set", "reported_error", "reported_test_error"
                    ),
                    bars("off by", "reported_gap"),
                    bars("mean |train − test| over the steps", "mean_error_gap", "mean_loss_gap"),
                    bars("seconds", "fit_seconds"),
                ],
                is_open=True,
            ),
            spaces.Section(name="Comparisons", panels=pictures, is_open=True),
        ],
        runset_settings=spaces.RunsetSettings(
            groupby=[spaces.Metric("Group"), spaces.Metric("JobType")]
        ),
    )


def main() -> None:
    """Build the workspace, and save it or print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument(
        "--project", default="decoupled-descent", help="as of tracking.wandb.project"
    )
    parser.add_argument("--json", action="store_true", help="print it, and save nothing")
    options = parser.parse_args()
    try:
        workspace = build(options.entity, options.project)
    except ModuleNotFoundError as error:
        sys.exit(f"needs the package {error.name}: pip install wandb-workspaces")
    if options.json:
        # What would be sent to the server.
        print(json.dumps(json.loads(workspace._to_model().model_dump_json()), indent=1))
        return
    try:
        workspace.save()
    except Exception as error:  # whatever the client raises on a refusal or a lost connection
        reason = " ".join(str(error).split())
        sys.exit(
            f"not saved: {reason}. Log in with `wandb login`, and log a run to the project first"
        )
    print(workspace.url)


if __name__ == "__main__":
    main()
