# What variants can do, as Snakemake runs it: a job per cell of `python -m lib.study.probes`, its record the output; the
# further seeds at the best rates are known when all rates are finished. From the repository's root:
#   snakemake --snakefile workflow/probes.smk --cores 2 --config profile=params/probes.yaml folder=records/mine
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parent))
from lib.study import cluster, probes

FOLDER = Path(config.get("folder", "records/mine"))
PROFILE = config.get("profile", "")
with cluster.one_sentence():
    MADE = probes.planned(PROFILE or None)
RATES = [f"{FOLDER}/{cell.name}.json" for cell in probes.cells(MADE)]


def further(wildcards):
    checkpoints.rates.get()
    return [f"{FOLDER}/{cell.name}.json" for cell in probes.further(MADE, FOLDER)]


rule all:
    localrule: True
    input:
        RATES,
        further,


checkpoint rates:
    localrule: True
    input:
        RATES,
    output:
        touch(f"{FOLDER}/.rates"),


rule cell:
    output:
        f"{FOLDER}/{{name}}.json",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        python=sys.executable,
        profile=PROFILE,
        folder=FOLDER,
    shell:
        "{params.python:q} -m lib.study.probes {params.profile:q} --write {params.folder:q} --only {wildcards.name:q}"
