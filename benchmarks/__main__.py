"""All benchmarks of a job, one after the other: `make bench`.

python -m benchmarks [JOB.yaml] [--images N] [--json]
"""

from benchmarks import cli, job, scaling, shapes, startup, today, trial
from benchmarks.common import main

PARTS = {
    "trial": trial.PART,
    "today": today.PART,
    "shapes": shapes.PART,
    "scaling": scaling.PART,
    "job": job.PART,
    "startup": startup.PART,
    "cli": cli.PART,
}

if __name__ == "__main__":
    main(PARTS, __doc__)
