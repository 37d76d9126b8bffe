"""Command-line tools. They import the core; the core imports none of them. Run as modules from the
repository's root.

    python -m tools.prepare gsm8k                     problem files from public data sets
    python -m tools.plan train.py config/aime.py      what a run will need, from config.json alone
    python -m tools.compare base.json tapo.json       paired differences of eval.py's results
    python -m tools.report out/a out/b                one page: curves, tables, trajectories by role
    python -m tools.tables out/ablations              a sweep's numbers as Markdown
    python -m tools.measure                           a checkpoint: log-probs, gradient, recovery
    python -m tools.bench                             speed and memory against peers and limits
"""
