#!/usr/bin/env bash
# Optuna 2.10.1 with SQLAlchemy 2.1: no study can be stored in a database.
#
# hydra-optuna-sweeper 1.3.0, the present release, asks for optuna below 3, which asks for sqlalchemy 1.1 or later without an
# upper bound, so that an installer takes today's. An in-memory study works with it; the first use of a database ends in
# a bare AssertionError from inside Optuna, without a word on versions. So `hydra.sweeper.storage=sqlite:///...`, the way to
# a search that can be gone on with, fails in a fresh environment that meets every declared requirement.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check optuna==2.10.1 sqlalchemy==2.1.0 setuptools==80.9.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import traceback
import warnings

warnings.simplefilter("ignore")
import optuna
import sqlalchemy

optuna.logging.set_verbosity(optuna.logging.ERROR)
print("optuna", optuna.__version__, "sqlalchemy", sqlalchemy.__version__)
optuna.create_study(study_name="in_memory").optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
print("in memory: works")
try:
    optuna.create_study(study_name="stored", storage="sqlite:///study.db")
except AssertionError as error:
    where = traceback.extract_tb(error.__traceback__)[-1]
    print(f"sqlite: AssertionError({str(error)!r}) in {where.name}")
    assert where.name == "get_current_version" and str(error) == ""
else:
    raise SystemExit("a study is stored: the finding no longer holds")
PYTHON
