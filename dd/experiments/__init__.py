"""From a configuration to a run folder.

In: a composed configuration of ``configs/``. Out: the run folder: records, summary, checkpoint,
pictures and report.
"""
