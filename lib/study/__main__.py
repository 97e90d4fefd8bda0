"""`python -m lib.study [params/PROFILE.yaml]`: train.ipynb by papermill for every variant and seed, then summary.ipynb.

Runs come in blocks: every variant once, and `sdpa` a second time as the A/A control, whose difference from itself
estimates the noise. The seed is the block's number; the order within blocks is balanced by a Williams square. What has
a record is not run again; what fails is reported at the end and stops nothing else.
"""

import argparse
import sys

from lib import parameters, paths
from lib.errors import UsageError
from lib.study import forecast, plan, runner


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study", description=__doc__.split("\n\n")[0])
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one the notebook's defaults")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="names or .py files instead of the profile's")
    parser.add_argument("--blocks", type=int, metavar="N", help="how many blocks (seeds 0 to N - 1)")
    parser.add_argument("--runs", type=int, metavar="N", help="at most N runs now; the same command goes on")
    same = "the session that goes on: for who knows that machine, device and code are the same and the pause was short"
    parser.add_argument("--session", metavar="NAME", help=same)
    parser.add_argument("--plan", action="store_true", help="only check and list the runs, and what they will take")
    parser.add_argument("--records", nargs="+", metavar="FOLDER", help="where --plan finds earlier records")
    options = parser.parse_args(words)
    if options.runs is not None and options.runs < 1:
        parser.error(f"--runs must be at least 1, not {options.runs}")
    lock = None
    try:
        runs, profile = plan.chosen(options.profile, options.variants, options.blocks)
        folder = paths.out_folder()
        if options.plan:
            states = ["finished" if runner.is_finished(run, folder) else "to run" for run in runs]
            for run, state in zip(runs, states, strict=True):
                print(
                    f"block {run['block']} position {run['position']}: {parameters.run_name(run['values'])} ({state})"
                )
            print(plan.about_order(runs))
            todo = [run for run, state in zip(runs, states, strict=True) if state == "to run"]
            print("\n".join(forecast.lines(todo, forecast.earlier(options.records))))
            return 0
        lock = runner.alone_in(folder)
        with runner.stoppable():
            return runner.study(runs, profile, folder, options.session, options.runs)
    except UsageError as error:
        print(f"python -m lib.study: {error}", file=sys.stderr)
        return 2
    except runner.Stopped as signal_name:
        print(f"\nstopped by {signal_name}; the same command finishes what is missing", file=sys.stderr)
        return 130
    finally:
        if lock is not None:
            lock.release()


if __name__ == "__main__":
    sys.exit(main())
