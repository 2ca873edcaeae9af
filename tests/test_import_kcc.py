"""Kisan Call Centre transcripts → dialogues: exact counts for every reason, every format and encoding, and the API."""

from __future__ import annotations

import csv
import gzip
import http.client
import http.server
import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from advisory import kcc
from advisory.importer import REASONS, Account, Rules, import_rows, raw_rows
from advisory.subject import clean_text, is_empty, is_price, is_weather
from advisory.tables import Broken, Raw, read_table, table_files
from litgpt.data import read_records
from litgpt.utils import UserError
from tests.kcc_sample import COLUMNS, broken_csv, csv_lines, is_banned, sample, tiny_knowledge, write_jsonl

NAMES = tiny_knowledge().names
RULES = Rules(source="kcc", system="आप सलाहकार हैं।", names=NAMES, is_banned=is_banned)


def run(path: Path, out_dir: Path, rules: Rules = RULES) -> Account:
    files = table_files(path)
    return import_rows([(file.name, raw_rows(read_table(file), kcc.KccRows(file))) for file in files], rules, out_dir)


def records(out_dir: Path) -> list[dict[str, Any]]:
    read_records(out_dir / "dialogues.jsonl")  # the contract
    return [json.loads(line) for line in (out_dir / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]


def one(tmp_path: Path, rules: Rules = RULES, **columns: str) -> dict[str, Any]:
    row = {
        "QueryText": "how to control yellow rust in wheat",
        "KccAns": "keep watching the field every week",
        **columns,
    }
    write_jsonl(tmp_path / "one.jsonl", [row])
    run(tmp_path / "one.jsonl", tmp_path / "out", rules)
    (record,) = records(tmp_path / "out")
    return record


def test_every_row_of_the_sample_is_kept_or_counted_under_its_reason(tmp_path: Path) -> None:
    made = sample()
    assert len(made.rows) >= 300
    text, broken = broken_csv(made.rows)
    (tmp_path / "dump.csv").write_text(text, encoding="utf-8")
    account = run(tmp_path / "dump.csv", tmp_path / "out")

    expected = made.dropped + Counter(broken_row=len(broken))
    assert {reason: account.dropped[reason] for reason in REASONS} == {reason: expected[reason] for reason in REASONS}
    assert account.rows == len(made.rows) + len(broken) == account.kept + sum(account.dropped.values())
    assert account.kept == made.kept == len(records(tmp_path / "out"))
    assert account.flags["repaired"] == made.repaired and account.scrubbed == made.scrubbed
    assert [int(place.split(":")[1]) for place in account.broken] == broken

    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert (
        report["rows_in"]
        == report["kept"] + report["dropped_total"]
        == report["kept"] + sum(report["dropped"].values())
    )
    assert all(len(report["examples"][reason]) == min(3, count) for reason, count in report["dropped"].items() if count)
    shown = (
        account.table() + json.dumps(report, ensure_ascii=False) + (tmp_path / "out/dialogues.jsonl").read_text("utf-8")
    )
    assert not [secret for secret in made.secrets if secret in shown]


@pytest.mark.parametrize(
    "form",
    "csv csv.gz bom utf-16 utf-16-le crlf cr semicolon array envelope jsonl jsonl.gz pretty api".split(),  # noqa: SIM905
)
def test_all_forms_of_a_dump_give_the_same_dialogues(form: str, tmp_path: Path) -> None:
    rows = [row for row in sample().rows if "\n" not in row["KccAns"] and ";" not in row["KccAns"]]
    text = "".join(csv_lines(rows))
    (tmp_path / "plain.csv").write_text(text, encoding="utf-8")
    wanted = run(tmp_path / "plain.csv", tmp_path / "plain")
    ending = "json" if form in ("array", "envelope", "pretty", "api") else "jsonl" if "jsonl" in form else "csv"
    path = tmp_path / f"dump.{ending}"
    semicolons = io.StringIO()
    csv.writer(semicolons, delimiter=";").writerows([COLUMNS, *(row.values() for row in rows)])
    content = {
        "csv": lambda: text.encode(),
        "csv.gz": lambda: gzip.compress(text.encode()),
        "bom": lambda: b"\xef\xbb\xbf" + text.encode(),
        "utf-16": lambda: text.encode("utf-16"),
        "utf-16-le": lambda: text.encode("utf-16-le"),
        "crlf": lambda: text.replace("\n", "\r\n").encode(),
        "cr": lambda: text.replace("\n", "\r").encode(),
        "semicolon": lambda: semicolons.getvalue().encode(),
        "array": lambda: json.dumps(rows).encode(),
        "envelope": lambda: json.dumps({"total": 9, "field": [{"id": "a"}], "records": rows}).encode("utf-8"),
        "api": lambda: json.dumps({"status": "ok", "target": {"a": []}, "records": rows}, indent=1).encode(),
        "jsonl": lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        "jsonl.gz": lambda: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
        "pretty": lambda: json.dumps(rows, indent=4, ensure_ascii=False).encode(),
    }[form]()  # fmt: skip
    path.write_bytes(content)
    account = run(path, tmp_path / "out")
    assert (account.rows, account.kept, account.dropped) == (wanted.rows, wanted.kept, wanted.dropped)
    assert records(tmp_path / "out") == records(tmp_path / "plain")


def test_a_file_may_mix_encodings_from_field_to_field(tmp_path: Path) -> None:
    line = b"QueryText,KccAns\nwhat about 25\xb0C for \xe0\xa4\x97\xe0\xa5\x87\xe0\xa4\xb9\xe0\xa5\x82\xe0\xa4\x82,"
    wrong = "गेहूं में पानी दें और देखें".encode().decode("latin-1").encode()
    (tmp_path / "a.csv").write_bytes(line + wrong + b"\n")
    run(tmp_path / "a.csv", tmp_path / "out")
    (record,) = records(tmp_path / "out")
    assert [m["content"] for m in record["messages"][1:]] == ["what about 25°C for गेहूं", "गेहूं में पानी दें और देखें"]


def test_column_names_vary_and_missing_ones_are_named(tmp_path: Path) -> None:
    columns = {"state_name": "UTTAR  PRADESH", "District Name": "SITAPUR", "CROP": "Paddy (Dhan)"}
    record = one(tmp_path, RULES, **columns, createddate="03-05-2017")
    assert record["meta"] == {
        "source": "kcc", "crop": "wheat", "crop_raw": "Paddy (Dhan)", "problem": "wheat_yellow_rust",
        "language": "en",
        "question_language": "en", "licence": "GODL-India", "flags": ["crop_mismatch"],
        "state": "Uttar Pradesh",
        "district": "Sitapur", "season": None, "query_type": None, "year": 2017,
    }  # fmt: skip
    (tmp_path / "b.csv").write_text("State,Crop,Query\nUP,Wheat,weeds\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.csv: no column KccAns; found: State, Crop, Query\. Expected"):
        run(tmp_path / "b.csv", tmp_path / "out")
    (tmp_path / "b.csv").write_text("Query Text,query_text,KccAns\na,b,c\n", encoding="utf-8")
    with pytest.raises(UserError, match="'Query Text' and 'query_text' both stand for question"):
        run(tmp_path / "b.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("question", "column", "crop", "problem", "flag"),
    [
        ("गेहूँ में पीला रतुआ लगा है क्या करें", "", "wheat", "wheat_yellow_rust", None),
        ("gehu me peela ratua", "Wheat", "wheat", "wheat_yellow_rust", None),
        ("control of khaira rog please", "Paddy (Dhan)", "rice", "rice_zinc_deficiency", "crop_from_column"),
        (
            "wilt control please",
            "Bengal Gram (Gram/Chick Pea/Kabuli/Chana)",
            "chickpea",
            "chickpea_wilt",
            "crop_from_column",
        ),
        ("how to use 500 gram of sulphur", "", None, None, None),
        ("sweet potato sowing time", "Sweet Potato (Shakarkand)", None, None, None),
        ("yellow rust control", "Others", None, None, None),
        ("pink bollworm in cotton and wilt", "Wheat", "cotton", "cotton_pink_bollworm", "crop_mismatch"),
    ],
)
def test_crops_and_problems_are_found_in_all_scripts(
    question: str, column: str, crop: str | None, problem: str | None, flag: str | None, tmp_path: Path
) -> None:
    record = one(tmp_path, QueryText=question, Crop=column)
    assert (record["meta"]["crop"], record["meta"]["problem"]) == (crop, problem)
    assert record["meta"]["flags"] == ([flag] if flag else [])
    # A question without its crop has no answer, so the crop is said.
    asked = record["messages"][1]["content"]
    assert asked == (f"{column.partition(' (')[0]}: {question}" if flag == "crop_from_column" else question)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("मौसम ठंडा है और पत्ते पीले हो रहे हैं क्या करें", "मौसम साफ हो तब छिड़काव करें और पानी न दें"),
        ("effect of rain on flowering of mango", "protect the flowers after rain and drain the field"),
        ("नीम के तेल का प्रभाव कितने दिन रहता है", "लगभग सात दिन तक प्रभाव रहता है"),
        ("seed rate of wheat per acre", "use 40 kg of seed per acre and sow in rows"),
        ("weed control in wheat", "pull out the weeds by hand 30 days after sowing"),
    ],
)
def test_useful_rows_are_not_taken_for_weather_price_or_nothing(question: str, answer: str) -> None:
    asked, told = clean_text(question), clean_text(answer)
    assert not is_weather(asked, told) and not is_price(asked) and not is_empty(asked, told)


def test_banned_pesticides_are_dropped_or_flagged(tmp_path: Path) -> None:
    answer = "spray phorate and endosulfan on the field"
    with pytest.raises(UserError, match=r"none of 1 rows was kept \(banned 1\)"):
        one(tmp_path, KccAns=answer)
    assert not (tmp_path / "out/dialogues.jsonl").exists() and (tmp_path / "out/report.json").exists()
    flagging = Rules(source="kcc", system="s", names=NAMES, is_banned=is_banned, banned="flag")
    assert one(tmp_path, flagging, KccAns=answer)["meta"]["flags"] == ["banned:endosulfan", "banned:phorate"]


def test_an_import_that_fails_leaves_the_old_dialogues(tmp_path: Path) -> None:
    one(tmp_path)
    before = (tmp_path / "out/dialogues.jsonl").read_bytes()
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError):
        run(tmp_path / "bad.csv", tmp_path / "out")
    assert (tmp_path / "out/dialogues.jsonl").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dialogues.jsonl", "report.json"]


# -- reading ----------------------------------------------------------------------------------------------------------


def rows_of(path: Path, content: bytes) -> list[Raw | Broken]:
    path.write_bytes(content)
    return list(read_table(path))


def test_a_broken_csv_row_costs_no_other_row(tmp_path: Path) -> None:
    good = "".join(f"a{n},b,c,d,e,f\n" for n in range(20))
    for slip in (
        '"open,b,c,d,e,f\n',
        'a,b,c,"open,e,f\n',
        'a,"x\n',
        '"\n',
        "a,b\n",
        "a,b,c,d,e,f,g\n",
        "a,\0,c,d,e,f\n",
    ):
        read = rows_of(tmp_path / "a.csv", f"A,B,C,D,E,F\n{good}{slip}{good}".encode())
        assert [row.line for row in read if isinstance(row, Broken)] == [22], slip
        assert sum(isinstance(row, Raw) for row in read) == 40, slip
    read = rows_of(
        tmp_path / "a.csv", b'A,B,C,D,E,F\na,"one\n\ntwo, ""x""",c,d,e,f\n5" apart,b,c,d,e,f\n"a "b" c",b,c,d,e,f\n'
    )
    assert [row.values[:2] if isinstance(row, Raw) else row for row in read] == [
        ["a", 'one\n\ntwo, "x"'], ['5" apart', "b"], ['a b" c"', "b"]
    ]  # fmt: skip


def test_broken_json_costs_only_itself(tmp_path: Path) -> None:
    lines = [
        b'{"a": "1"}',
        b"null",
        b'{"a": "3"',
        b'{"a": NaN}',
        b'{"a": "\\ud83d", "b": [1], "c": 2}',
        b"{]",
        b'{"a": "7"}',
    ]
    lines.append(b'{"a": "cut of')
    read = rows_of(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [row.line for row in read if isinstance(row, Broken)] == [2, 3, 6, 8]
    assert [list(row.values) for row in read if isinstance(row, Raw)] == [["1"], [""], ["\ud83d", "", "2"], ["7"]]
    read = rows_of(tmp_path / "a.json", b'[{"a": "1"},\n {"a": oops},\n {"a": "3"}')
    assert [type(row).__name__ for row in read] == ["Raw", "Broken", "Raw"]
    deep = rows_of(tmp_path / "a.json", b'[{"a": ' + b"[" * 100_000 + b'},\n{"a": "2"}]')
    assert [type(row).__name__ for row in deep] == ["Broken", "Raw"]


def test_long_json_is_read_in_pieces(tmp_path: Path) -> None:
    objects = [{"n": str(n), "text": "गेहूं " * (n % 400)} for n in range(3000)]
    for content in (
        json.dumps(objects, ensure_ascii=False),
        json.dumps(objects, indent=1),
        "\n".join(map(json.dumps, objects)),
    ):
        read = rows_of(tmp_path / "a.json", content.encode())
        assert [row.values[0] for row in read if isinstance(row, Raw)] == [str(n) for n in range(3000)]


def test_damaged_gzip_gives_what_is_before_the_damage(tmp_path: Path) -> None:
    whole = gzip.compress("".join(["A,B\n", *(f"{n},{n * 7919 % 1000}\n" for n in range(5000))]).encode())
    read = rows_of(tmp_path / "a.csv.gz", whole[: len(whole) // 2])
    assert sum(isinstance(row, Raw) for row in read) > 100 and isinstance(read[-1], Broken)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x00\x01\x02\x03", b"\xff\xfe"])
def test_what_is_no_table_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    for name in ("a.csv", "a.json", "a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=name):
            rows_of(tmp_path / name, content)
    with pytest.raises(UserError, match="no file or folder"):
        table_files(tmp_path / "absent")


# -- the API ----------------------------------------------------------------------------------------------------------


class Api(http.server.BaseHTTPRequestHandler):
    """A small data.gov.in."""

    rows: list[dict[str, str]]
    trouble: list[str]
    """What goes wrong with the next answers."""
    asked: list[dict[str, list[str]]]

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        self.asked.append(query)
        trouble = self.trouble.pop(0) if self.trouble else ""
        offset, limit = int(query["offset"][0]), min(100, int(query["limit"][0]))
        page = {"status": "ok", "total": len(self.rows), "records": self.rows[offset : offset + limit]}
        body = json.dumps({"status": "error", "message": "busy"} if trouble == "message" else page).encode()
        self.send_response(int(trouble) if trouble.isdigit() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output quiet."""


@pytest.fixture
def api() -> Iterator[tuple[type[Api], str]]:
    handler = type("Handler", (Api,), {"rows": sample().rows, "trouble": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/resource/x"
    server.shutdown()
    server.server_close()


def test_the_api_is_paged_retried_and_resumed(api: tuple[type[Api], str], tmp_path: Path) -> None:
    handler, url = api
    waits: list[float] = []
    total = len(handler.rows)

    def download(**more: Any) -> int:
        return kcc.download(tmp_path / "pages", "SECRET", url=url, wait=waits.append, say=lambda line: None, **more)

    handler.trouble = ["503", "cut", "429", "message"]
    assert download(max_rows=150) == 150
    assert waits == [1, 2, 4, 8]
    handler.trouble = [""] + ["500"] * 10
    with pytest.raises(UserError, match=r"HTTP 500.*what has arrived is kept") as caught:
        download()
    assert "SECRET" not in str(caught.value)
    handler.trouble, handler.asked[:] = [], []
    assert download() == total
    # It goes on behind what is there, and the filter and key were sent.
    assert handler.asked[0]["offset"] == ["250"] and handler.asked[0]["api-key"] == ["SECRET"]
    assert b"SECRET" not in b"".join(path.read_bytes() for path in (tmp_path / "pages").iterdir())
    with pytest.raises(UserError, match="another query"):
        download(filters={"StateName": "BIHAR"})

    files = list(kcc.pages(tmp_path / "pages"))
    account = import_rows([(f.name, raw_rows(read_table(f), kcc.KccRows(f))) for f in files], RULES, tmp_path / "out")
    assert (account.rows, account.kept) == (total, sample().kept)


@pytest.mark.parametrize(("code", "told"), [("403", "DATA_GOV_IN_API_KEY"), ("400", "check url and filters")])
def test_a_refusal_is_not_tried_again(code: str, told: str, api: tuple[type[Api], str], tmp_path: Path) -> None:
    handler, url = api
    handler.trouble = [code] * 9
    with pytest.raises(UserError, match=told):
        kcc.download(tmp_path, "SECRET", url=url, wait=lambda seconds: None, say=lambda line: None)
    assert len(handler.asked) == 1


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "http://[::1/x", "http://a.example:port/x", "http://", "http://a b.example/x",
     "http://a.example/x y", "http://a.example/x\ny", "http://a.example/खेत", "http://a.example/x?api-key=1", "x"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_at_once(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no web address") as refused:
        kcc.download(tmp_path / "x", "SECRET", url=url, wait=lambda seconds: None)
    assert "\n" not in str(refused.value) and not (tmp_path / "x").exists()


def test_the_key_stands_in_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, timeout: float) -> None:
        raise http.client.InvalidURL(f"URL can't contain control characters.\n{address} of SECRET KEY/")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match="control characters") as refused:
        kcc.download(
            tmp_path, "SECRET KEY/", url="http://a.example/x", wait=lambda seconds: None, say=lambda line: None
        )
    assert "SECRET" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b'{"url": "http', b"", b"\xff\xfe"])
def test_a_broken_note_of_the_query_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "query.meta").write_bytes(content)
    with pytest.raises(UserError, match=r"query\.meta is broken; remove"):
        kcc.download(tmp_path, "SECRET", url="http://a.example/x")
