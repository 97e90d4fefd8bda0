"""What a measurement says of the stand-in's GPUs; run as a script, in a process that has the stand-in instead of NVML.

`scenes.py replayed FOLDER` plays `replay` and `faults` by a clock of their own, so that a minute takes no time, and
`scenes.py real FOLDER` plays `lost` and `live` by the real one; what they find is written to FOLDER. Imports stand in
the functions: the processes that Zeus spawns import this file too.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

SCENARIO = Path(os.environ["NVML_STANDIN"])
START = 1_000_000.0  # of the replayed clock


def stage(**facts) -> None:
    """Changes the scenario, whole or not at all: other processes read it."""
    half = SCENARIO.with_suffix(".tmp")
    half.write_text(json.dumps(facts))
    os.replace(half, SCENARIO)


class Clock:
    """Seconds that pass only where `sleep` says so; the wall clock may run off by `ahead_s`."""

    def __init__(self):
        self.now_s, self.ahead_s = START, 0.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds

    def module(self):
        wall = SimpleNamespace(time=lambda: self.now_s + self.ahead_s, perf_counter=self, monotonic=self)
        return SimpleNamespace(**vars(wall), sleep=self.sleep, process_time=time.process_time)


def on_the_gpu():
    """A device that PyTorch takes for the CPU and the instruments for the stand-in's second GPU."""
    import pynvml
    import torch

    from lib.measure import energy

    energy.gpu_uuid = lambda device: pynvml.CARD
    return torch.device("cpu")


def on_a_replayed_clock() -> Clock:
    import pynvml
    import zeus.monitor.energy
    import zeus.monitor.power

    from lib.measure import energy, meter

    clock = Clock()
    pynvml.now = zeus.monitor.energy.time = zeus.monitor.power.time = clock
    zeus.monitor.power.sleep = pynvml.spend = clock.sleep
    energy.time = meter.time = clock.module()
    return clock


@contextlib.contextmanager
def worked(meter):
    """A window of the meter, in which the GPU works from its begin to its end."""
    import pynvml

    with meter.window():
        pynvml.work(True)
        yield
        pynvml.work(False)


def polled(clock: Clock, begin_s: float, end_s: float):
    """The trace that Zeus's polling loop gives between two moments."""
    import queue

    import numpy as np
    from zeus.monitor.power import PowerDomain, _domain_polling_process

    from lib.measure import energy

    samples = queue.SimpleQueue()
    resumed_s, clock.now_s = clock.now_s, begin_s
    stop = SimpleNamespace(is_set=lambda: clock.now_s > end_s)
    ready = SimpleNamespace(set=lambda: None)
    _domain_polling_process(PowerDomain.DEVICE_INSTANT, [0], samples, ready, stop, energy.TRACE_PERIOD_S)
    clock.now_s = resumed_s
    found = []
    while (sample := samples.get()) != "STOP":
        found.append((sample.timestamp, sample.power_mw / 1000))
    return energy.Trace(*np.array(found).T)


def replay():
    """Counter and trace against the truth: every shape, windows of 1 to 60 s in one and in three parts."""
    import pynvml

    from lib.measure.meter import Meter

    device, clock, rows = on_the_gpu(), on_a_replayed_clock(), []
    for shape in ("constant", "square", "ramp", "real"):
        stage(start=START, shape=shape, at_work=True)
        for window_s in (1, 5, 10, 30, 60):
            for offset_s in (3.03, 7.58):
                for parts in (1, 3):
                    clock.now_s = START + offset_s
                    meter = Meter(device)
                    pynvml._work.clear()
                    for part in range(parts):
                        with worked(meter):
                            clock.sleep(window_s / parts)
                            meter.mark(part + 1)
                        clock.sleep(1.7)  # a validation
                    meter.trace = polled(clock, START + offset_s - 2.04, clock.now_s)
                    walls = [(s.begin_wall_s, s.end_wall_s) for s in meter.windows]
                    true_j = sum(pynvml.true_joules(*wall, shape, START) for wall in walls)
                    rows.append(
                        {
                            "shape": shape,
                            "window_s": window_s,
                            "parts": parts,
                            "true_j": true_j,
                            "counter_j": sum(meter.gpu_counter.windows_j),
                            "trace_j": meter.trace_j,
                            "reading": meter.energy(),
                            "log": meter.log(),
                            "power_w": meter.power()[1],
                            "edges_j": meter.gpu_counter.edges_j,
                        }
                    )
    return rows


def edges():
    """Energy of many windows, whose edges fall anywhere between two steps of the counter, against the truth.

    A row per seed of the phase: mean error of 20 windows, with and without waiting for the counter's steps, and what a
    meter says of them. The counter may show its joules later than they were used.
    """
    import numpy as np
    import pynvml

    from lib.measure.meter import Meter

    device, clock, rows = on_the_gpu(), on_a_replayed_clock(), []
    for window_s, late_s, aligned in [(7.0, 0.0, True), (7.0, 0.08, True), (7.0, 0.0, False), (0.6, 0.0, True)]:
        for seed in range(5):
            random = np.random.default_rng(seed)
            clock.now_s = START + random.uniform(0, 0.1)
            stage(start=START, shape="constant", at_work=True, late_s=late_s)
            pynvml._work.clear()
            meter = Meter(device)
            if not aligned:
                meter.gpu_counter.read = None
            for _ in range(20):
                with worked(meter):
                    clock.sleep(window_s + random.uniform(0, 0.1))
                clock.sleep(random.uniform(0.2, 0.5))
            true_j = np.array([300.0 * seconds for seconds in meter.windows_s])
            error = float((np.array(meter.gpu_counter.windows_j) / true_j - 1).mean())
            rows.append({"window_s": window_s, "late_s": late_s, "aligned": aligned, "error": error})
            rows[-1] |= {"reading": meter.energy(), "after_w": meter.gpu_counter.after_w}
    return rows


def faults():
    """What becomes of a minute's window when something fails: joules, reason, and the checks."""
    import pynvml

    from lib.measure import energy, sampler, selfcheck
    from lib.measure.meter import Meter

    device, clock, found = on_the_gpu(), on_a_replayed_clock(), {}

    def sampled(meter, window_s):
        """Seconds of the clock, in which the GPU is sampled as the sampler's process does it."""
        for _ in range(round(window_s / 0.5)):
            clock.sleep(0.5)
            with contextlib.suppress(pynvml.NVMLError):
                meter.samples.append(sampler.sample(energy.nvml_handle(device), clock.now_s + clock.ahead_s))

    def measured(
        name, trace=True, seconds=(20, 20, 20), during=None, idle_s=0, before=None, visible=None, between=None, **facts
    ):
        clock.now_s, clock.ahead_s = START + 5.0, 0.0
        pynvml._work.clear()
        ordinary = {"start": START, "shape": "constant"}
        stage(**ordinary | facts)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        meter = Meter(device)
        assert os.environ.pop("CUDA_VISIBLE_DEVICES", None) == visible
        if before is not None:
            before(meter)
        for part, window_s in enumerate(seconds):
            with worked(meter):
                sampled(meter, window_s)
                meter.mark(part + 1)
                if during is not None and part == 1:
                    during(ordinary | facts)
            if between is not None:
                stage(**ordinary | facts | between)
            sampled(meter, 1)
            if between is not None:
                stage(**ordinary | facts)
        if trace and meter.gpu_counter.monitor is not None:
            meter.trace = polled(clock, START + 4, clock.now_s)
        clock.now_s = max(clock.now_s, START + 76)
        meter.rest(idle_s)
        values, reasons = meter.metrics()
        values |= {"gpu_busy_fraction": None, "mfu": None}
        reasons |= {"gpu_busy_fraction": "not_asked_for", "mfu": "peak_unknown"}
        warmed = {"steady": True, "seconds": 5.0}
        checks = {check.check: check.verdict for check in selfcheck.checks(meter, values, reasons, 0.0, warmed)}
        found[name] = {"energy_j": values["energy_j"], "reason": reasons.get("energy_j"), "checks": checks}
        found[name] |= {"idle_w": values["idle_power_w"], "net_j": values["net_energy_j"], "idle": meter.idle}
        found[name] |= {"idle_reason": reasons.get("idle_power_w"), "net_reason": reasons.get("net_energy_j")}
        found[name] |= {"log": [point["energy_j"] for point in meter.log()], "others": meter.foreign_processes}
        found[name] |= {"utilization": values["gpu_utilization_percent"], "states": meter.states}
        found[name] |= {"summary": sampler.summary([one for _, one in meter.inside]), "series": meter.gpu_series()}

    def crash(meter):
        with contextlib.suppress(ZeroDivisionError), meter.window():
            clock.sleep(30)
            raise ZeroDivisionError
        clock.now_s = START + 5.0

    lost = {"nvmlDeviceGetTotalEnergyConsumption": pynvml.NVML_ERROR_GPU_IS_LOST}
    lost_all = lost | {"nvmlDeviceGetHandleByUUID": pynvml.NVML_ERROR_GPU_IS_LOST}
    unsupported = {"nvmlDeviceGetTotalEnergyConsumption": pynvml.NVML_ERROR_NOT_SUPPORTED}
    forbidden = {"nvmlDeviceGetTotalEnergyConsumption": pynvml.NVML_ERROR_NO_PERMISSION}
    measured("nothing", idle_s=30, shape="worked")
    measured("still cooling", idle_s=5, shape="cooling")
    measured("uuid", visible=f"{pynvml.CARD}")
    measured("uuids", visible=",".join(reversed(pynvml.CARDS)))
    measured("other numbers", visible="1,0")
    measured("crashed before", before=crash)
    measured("reset", reset_at=30.0)
    measured("reset and counted on", seconds=(10, 250), reset_at=60.0)
    measured("stuck", stuck_at=0.0)
    measured("stuck later", stuck_at=40.0)
    measured("stuck in a window", seconds=(20, 60), stuck_at=40.0)
    measured("unsupported", errors=unsupported)
    measured("too old", architecture=pynvml.NVML_DEVICE_ARCH_PASCAL)
    measured("lost before", errors=lost)
    measured("lost in the window", trace=False, during=lambda facts: stage(**facts, errors=lost))
    measured("lost altogether", trace=False, during=lambda facts: stage(**facts, errors=lost_all), idle_s=30)
    measured("no driver", errors={"nvmlInit": pynvml.NVML_ERROR_DRIVER_NOT_LOADED})
    measured("mig", mig=1)
    measured("mig by variable", visible="MIG-1")
    measured("mig by name", known_as=[pynvml.CARDS[0], "MIG-standin-1"])
    measured("permission", errors=forbidden)
    measured("foreign", processes=["own", 1])
    measured("foreign for a while", during=lambda facts: stage(**facts, processes=["own", 1, 2]))
    measured("hidden processes", processes=[1])
    measured("short", seconds=(30, 1.5, 30))  # the shortest counts, not the sum
    measured("flagged length", seconds=(30, 3, 27))
    measured("short idle", idle_s=1)
    measured("busy idle", idle_s=30)
    measured("no trace", trace=False)
    for scale in (1.04, 0.93, 1.15):
        measured(f"counter times {scale}", scale=scale)
    measured("clock jumps", during=lambda _: setattr(clock, "ahead_s", 3.0))
    measured("throttled", throttled=True)
    measured("capped", capped=True)
    measured("busy between", utilization=50, seconds=(30, 30), between=dict(utilization=100))
    measured("slower and hotter", during=lambda facts: stage(**facts, clock=1500, temperature=80))
    return found


def train(steps, report, folder):
    """A run as the notebook does it, on the stand-in's GPU; the record's path."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from make import CERTIFICATE
    from test_training import make_rows

    from lib import parameters, paths, record, training
    from lib.data import corpus
    from lib.measure import assemble, phases, warmth
    from lib.model import build_model, gpt2_config

    on_the_gpu()
    warmth.STEADY_OVER_S = 0.5
    cells = json.loads((paths.ROOT / "notebooks" / "train.ipynb").read_text())["cells"]
    (source,) = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    p = {name: line.default for name, line in parameters.declared(source).items()}
    p |= {"layers": 1, "width": 32, "heads": 2, "positions": 32, "context": 16, "validation_sequences": 4, "epochs": 2}
    p = SimpleNamespace(**p | {"steps_per_epoch": steps, "device": "cpu", "precision": "fp32"})
    model = build_model("sdpa", gpt2_config(1, 32, 2, 32, 30), p.seed)
    trainer = training.Trainer(model, corpus.Corpus(make_rows(), make_rows(9), 30), p)
    with trainer.meter.watching():
        trainer.warm_up()
        trainer.run(report, reports=2 * steps)
    path = record.write(assemble.make_record(p, trainer, CERTIFICATE, [], phases.measured(trainer, 0)), folder)
    return trainer.meter, path


def live(folder):
    """Seven real seconds under Zeus and the processes beside it, by a UUID in CUDA_VISIBLE_DEVICES."""
    import pynvml

    os.environ["CUDA_VISIBLE_DEVICES"] = pynvml.CARD
    start = time.time() - 10
    stage(start=start, shape="real")
    meter, path = train(6, lambda *_: time.sleep(0.5), folder)
    walls = [(window.begin_wall_s, window.end_wall_s) for window in meter.windows]
    true_j = [pynvml.true_joules(*wall, "real", start) for wall in walls]
    return {"record": str(path), "true_j": true_j, "trace_j": meter.trace_j}


def stepped(folder):
    """Two rounds of training steps that take turns, in windows of about 0.4 s, which for once are long enough."""
    from lib.measure import energy, warmth
    from lib.record import steps as records
    from lib.study import steps

    stage(start=time.time() - 10, shape="constant")
    on_the_gpu()
    warmth.STEADY_OVER_S, energy.SHORTEST_WINDOW_S = 0.5, 0.0
    tiny = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 30, "rounds": 2, "window_s": 0.4, "device": "cpu"}
    tiny |= {"variants": ["sdpa", "linear"], "sizes": [{"context": 8, "batch_size": 2}]}
    folder.mkdir()
    steps.measure(steps.Plan(**tiny), folder / "steps.json", say=lambda _: None)
    return records.load(folder / "steps.json").model_dump(mode="json")


def lost(folder):
    """The GPU stops answering in the middle of a run."""
    import pynvml

    facts = {"start": time.time() - 10, "shape": "real"}
    stage(**facts)
    functions = ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues", "nvmlDeviceGetHandleByUUID")

    def report(done, _):
        if done == 6:
            stage(**facts, errors=dict.fromkeys(functions, pynvml.NVML_ERROR_GPU_IS_LOST))
        time.sleep(0.1)

    meter, path = train(4, report, folder)
    return {"record": str(path), "trace": meter.trace is not None}


if __name__ == "__main__":
    on_own_clock, folder = sys.argv[1] == "replayed", Path(sys.argv[2])
    scenes = (replay, edges, faults) if on_own_clock else (lost, live, stepped)
    said = {scene.__name__: scene(*() if on_own_clock else (folder / scene.__name__,)) for scene in scenes}
    (folder / f"{sys.argv[1]}.json").write_text(json.dumps(said))
