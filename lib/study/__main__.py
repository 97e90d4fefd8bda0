"""`python -m lib.study [params/PROFILE.yaml]`: train.ipynb by papermill for every variant and seed, then summary.ipynb.

Runs come in blocks: every variant once, and `sdpa` a second time as the A/A control, whose difference from itself
estimates the noise. The seed is the block's number; the order within blocks is balanced by a Williams square. What is
whole, of the same tokens, is not run again; a block that was torn is set aside and runs again as a whole (of one block
alone what is missing is run). What fails is reported at the end and stops nothing else.
"""

import argparse
import sys

from lib import parameters, paths
from lib.errors import UsageError
from lib.study import blocks, forecast, plan, runner


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
        own_metrics = plan.own_metrics(options.profile)
        folder = paths.out_folder()
        if options.plan:
            return _show_plan(runs, folder, options)
        lock = runner.alone_in(folder)
        with runner.stoppable():
            return runner.study(runs, profile, folder, options.session, options.runs, own_metrics)
    except UsageError as error:
        print(f"python -m lib.study: {error}", file=sys.stderr)
        return 2
    except runner.Stopped as signal_name:
        print(f"\nstopped by {signal_name}; the same command finishes what is missing", file=sys.stderr)
        return 130
    finally:
        if lock is not None:
            lock.release()


def _show_plan(runs: list[dict], folder, options) -> int:
    """Prints what the command would do, and raises UsageError at the end for what it would refuse."""
    data, refused = runner.Data(), None
    try:
        runner.check_data(runs, data)
        later = blocks.settled(runs, folder, data)
        found = blocks.examined(later.runs, folder, data, options.session)
    except UsageError as error:  # said at the end, where it is seen; what is there already counts by its parameters
        data, refused = None, error
        later = blocks.settled(runs, folder, data)
        found = blocks.examined(later.runs, folder, data, options.session)
    for block in found:
        for run, one in zip(block.runs, block.found, strict=True):
            state = "to run" if run in block.todo else "finished"
            if state == "to run":
                reason = blocks.examined_run(run, folder, data)[1]
                state = "to run again" if one is not None else f"to run: {reason}" if reason else state
            print(f"block {run['block']} position {run['position']}: {parameters.run_name(run['values'])} ({state})")
    print(*later.says, *blocks.about(found), plan.about_order(runs), sep="\n")
    todo = [run for block in found for run in block.todo]
    print("\n".join(forecast.lines(todo, forecast.earlier(options.records))))
    if refused is not None:
        raise refused
    return 0


if __name__ == "__main__":
    sys.exit(main())
