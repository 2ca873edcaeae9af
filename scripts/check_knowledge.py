"""Check the crop facts in `data/knowledge/`: every fault with its file and line."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from advisory.check import check_files, check_folder, page
from advisory.knowledge import KNOWLEDGE_DIR, load_knowledge
from advisory.pesticides import PesticideList
from litgpt.utils import UserError, atomic_file, run_cli


def check_knowledge(
    files: tuple[Path, ...] = (), knowledge_dir: Path = KNOWLEDGE_DIR, page_path: Path | None = None
) -> None:
    """Check the crop facts; every fault is printed as file:line, and the exit code is 2 if there is one.

    Args:
        files: only these files; by default all of the folder, crops and rules.
        knowledge_dir: the folder of crop files, rules and the list of pesticides.
        page_path: write counts and gaps here, as Markdown, when there is no fault; ours is docs/knowledge.md.
    """
    pesticides = PesticideList.load(knowledge_dir)
    checked = check_files(list(files), pesticides) if files else check_folder(knowledge_dir, pesticides)
    for fault in checked.faults:
        print(fault)
    if checked.faults:
        raise UserError(f"{len(checked.faults)} faults in {len({fault.path for fault in checked.faults})} files")
    problems = sum(len(file.problems) for file in checked.files)
    print(f"{len(checked.files)} crops, {problems} problems, no fault")
    if page_path is not None:
        with atomic_file(page_path) as temporary:
            temporary.write_text(page(load_knowledge(knowledge_dir), pesticides), encoding="utf-8")
        print(page_path)


if __name__ == "__main__":
    run_cli(check_knowledge)
