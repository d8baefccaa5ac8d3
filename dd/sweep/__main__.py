"""``python -m dd.sweep FOLDER``: gathers the jobs of a multirun."""

from dd.sweep.show import main

if __name__ == "__main__":
    main()
