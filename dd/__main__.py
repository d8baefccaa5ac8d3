"""``python -m dd experiment=xor``: train optimizers side by side and write a run folder."""

import os
import sys
import warnings
from pathlib import Path

try:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from dd.console import print_report
    from dd.experiment import Experiment
except ModuleNotFoundError as error:
    sys.exit(
        f"python -m dd needs the package {error.name!r}: pip install "
        "'decoupled-descent[experiments]'"
    )

INSTALLED = Path(__file__).parent / "configs"
SOURCE = Path(__file__).parents[1] / "configs"


@hydra.main(
    version_base="1.3",
    config_path=str(INSTALLED if INSTALLED.is_dir() else SOURCE),
    config_name="config",
)
def main(config: DictConfig) -> None:
    """Run one configuration; exit with 1 and a sentence when it cannot be done."""
    # torch's own forward-mode formulas still go through a deprecated compiler.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    # The loop clears the gradients before every step, which is what this warning asks for.
    warnings.filterwarnings("ignore", message=".*create_graph=True will create a reference cycle.*")
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    expected = () if full_error else (OSError, RuntimeError, ValueError)
    try:
        experiment = Experiment(config, Path(HydraConfig.get().runtime.output_dir))
        experiment.run()
    except expected as error:
        sys.exit(f"error: {error} (HYDRA_FULL_ERROR=1 shows where)")
    print_report(experiment.summary, str(experiment.figure), experiment.notes)
    if experiment.failures:
        sys.exit("\n".join(f"stopped early: {failure}" for failure in experiment.failures))


if __name__ == "__main__":
    main()
