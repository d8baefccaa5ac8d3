"""``python -m dd.report FOLDER...``: writes the report of a run, or one of several runs."""

from dd.report.command import main

if __name__ == "__main__":
    main()
