"""One adapter per family of networks, all behind `protocol.Model`; `load.load_model` picks one by name.

Knows nothing of schedules, solvers or scores. Import the modules: this package itself imports nothing.
"""
