"""Ask the crop adviser one question; the Hindi answer appears as the model writes it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from advisory.advisor import DISCLAIMER_HI, MAX_QUESTION_CHARACTERS, Advisor, clean_question, default_checkpoint
from advisory.case import with_case_lines
from advisory.facts import load_facts
from litgpt.generate import Sampling
from litgpt.utils import UserError, parse_dtype, run_cli

KNOWLEDGE = Path(__file__).resolve().parents[1] / "data" / "knowledge"

THOUGHT_HEADER_HI = "सोच:"
ANSWER_HEADER_HI = "सलाह:"
NO_ANSWER_HI = "मॉडल के पास इसका उत्तर नहीं है।"
CUT_HI = "(उत्तर बीच में रुक गया: --max_new_tokens बढ़ाकर फिर पूछें।)"


def advise(
    question: str,
    *,
    checkpoint_dir: Path | None = None,
    show_thought: bool = False,
    max_new_tokens: int = 512,
    max_thought_tokens: int = 200,
    temperature: float = 0.0,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> None:
    """Ask the crop adviser one question, for instance "गेहूं के पत्तों पर पीली धारियां हैं, क्या करूं?".

    Crop and age are read from the words and told to the model as lines of their own, as in its training. The answer
    goes to stdout, everything else to stderr.

    Args:
        question: the question, or - to read it from stdin.
        checkpoint_dir: a lit directory; by default out/demo/final, or else out/distill/final.
        show_thought: print the model's thought before its answer.
        max_new_tokens: the longest answer, in tokens; about 4 make a Hindi word.
        max_thought_tokens: the longest thought, in tokens; after so many it is ended.
        temperature: 0 gives the most probable answer, always the same; up to about 1 for more variety.
        seed: makes an answer with a temperature repeatable.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16; by default as stored.
    """
    for stream in (sys.stdout, sys.stderr):
        # A C locale or a Windows console may be set to an encoding without Devanagari.
        getattr(stream, "reconfigure", lambda **_: None)(encoding="utf-8")
    question = clean_question(_read_stdin() if question == "-" else question)
    if checkpoint_dir is None:
        checkpoint_dir = default_checkpoint()
        print(f"checkpoint: {checkpoint_dir}", file=sys.stderr)
    advisor = Advisor(
        checkpoint_dir,
        max_new_tokens=max_new_tokens,
        max_thought_tokens=max_thought_tokens,
        sampling=Sampling(temperature),
        seed=seed,
        device=device,
        dtype=parse_dtype(dtype) if dtype is not None else None,
    )

    question = with_case_lines(question, load_facts(KNOWLEDGE))
    printed: set[str] = set()
    for piece in advisor.stream(question):
        if piece.kind == "cut":
            print(f"\n{CUT_HI}", file=sys.stderr)
        if not piece.text or (piece.kind == "thought" and not show_thought):
            continue
        if show_thought and piece.kind not in printed:
            print("\n\n" * bool(printed) + (THOUGHT_HEADER_HI if piece.kind == "thought" else ANSWER_HEADER_HI))
        printed.add(piece.kind)
        print(piece.text, end="", flush=True)
    if printed:
        print(flush=True)
    if "answer" not in printed:
        print(NO_ANSWER_HI, file=sys.stderr)
    print(f"\n{DISCLAIMER_HI}", file=sys.stderr)


def _read_stdin() -> str:
    longest = 4 * MAX_QUESTION_CHARACTERS
    content = sys.stdin.buffer.read(longest + 1)
    if len(content) > longest:
        raise UserError(f"the question on stdin is longer than {MAX_QUESTION_CHARACTERS} characters: shorten it")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError("the question on stdin is not UTF-8 text: save it as UTF-8 and try again") from None


if __name__ == "__main__":
    run_cli(advise, positional=True)
