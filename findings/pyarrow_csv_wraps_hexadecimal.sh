#!/usr/bin/env bash
# pyarrow 22.0.0: read_csv takes hexadecimal text for signed numbers, and wraps it.
#
# A column of cells such as 0x1 is inferred to be int64, which few would expect of a table: hexadecimal cells are mostly
# identifiers, addresses or hashes. Beyond 63 bits the value wraps instead of leaving the column text, as decimal cells of
# that size do (they become double): 0xFFFFFFFFFFFFFFFF is read as -1, and two different identifiers can so become a number
# and its opposite. A minus sign before 0x makes the column text.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check pyarrow==22.0.0
"$folder/env/bin/python" - <<'PYTHON'
import io

import pyarrow
import pyarrow.csv


def read(*cells):
    column = pyarrow.csv.read_csv(io.BytesIO("\n".join(["id", *cells]).encode()))["id"]
    print(f"pyarrow {pyarrow.__version__}: {', '.join(cells)} -> {column.type} {column.to_pylist()}")
    return str(column.type), column.to_pylist()


assert read("0x1", "0xFFFFFFFFFFFFFFFF") == ("int64", [1, -1])
assert read("0x8000000000000000") == ("int64", [-(2**63)])
assert read("1", "18446744073709551615") == ("double", [1.0, 2.0**64])
assert read("-0x1", "0x1")[0] == "string"
PYTHON
