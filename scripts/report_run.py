"""Write a run's report and model card from its files: tables, plots, what is known and what is not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from litgpt.report import write_report
from litgpt.utils import run_cli


def report_run(
    out_dir: Path = Path("out/distill"),
    exam: Path | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: tuple[str, ...] = (),
) -> None:
    """Write report/ of a run, finished or not, and the model card final/README.md of a finished one.

    Args:
        out_dir: run directory of train_distill.py.
        exam: exam.json of the trained model; without it the one in the run directory, if there is one.
        license: licence of the model as the Hugging Face hub names it, e.g. apache-2.0; without it: unknown.
        base_model: the dense model's name on the hub; without it the one its directory's name gives, if any.
        datasets: names on the hub of the training data, for the card.
    """
    for path in write_report(out_dir, exam=exam, license=license, base_model=base_model, datasets=datasets):
        print(path)


if __name__ == "__main__":
    run_cli(report_run)
