"""Reports of runs in one HTML file each; ``python -m dd.report`` writes them.

In: run folders, and nothing else of an experiment. Out: ``report.html``.
"""
