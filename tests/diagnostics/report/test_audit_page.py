"""report.html of an audit, read as text."""

import base64
import hashlib
import html.parser
import json
import pathlib
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from ranktuner_jax.diagnostics import report
from ranktuner_jax.diagnostics.report import aggregates
from ranktuner_jax.diagnostics.report.conversations import encode
from ranktuner_jax.diagnostics.report.phrasing import percent
from ranktuner_jax.errors import UserError
from tests.diagnostics.report import audits

Columns = dict[str, np.ndarray]
AuditFolder = tuple[pathlib.Path, Columns]


class Reader(html.parser.HTMLParser):
    """Collects the scripts, the text outside of scripts and styles, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.addresses: list[str | None] = []
        self.tags: set[str] = set()
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def read(page: pathlib.Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def test_the_page_is_small_and_refers_to_nothing_outside(page: pathlib.Path, read: Reader) -> None:
    assert page.stat().st_size <= 3_000_000
    assert all(address == "data:," or (address or "").startswith("#") for address in read.addresses)
    assert not read.tags & {"img", "iframe", "object", "embed", "form"}
    assert "@import" not in page.read_text(encoding="utf-8")


def test_only_scripts_whose_hash_the_policy_holds_would_run(
    page: pathlib.Path, read: Reader
) -> None:
    policy = re.search(r'Security-Policy" content="([^"]*)"', page.read_text(encoding="utf-8"))
    assert policy is not None
    allowed = re.findall(r"&#39;sha256-([^&]*)&#39;", policy[1])
    code = [text for attributes, text in read.scripts if "type" not in attributes]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert digests == allowed
    assert len(code) == 2
    assert "unsafe-eval" not in policy[1]


def test_hostile_text_is_text(page: pathlib.Path, read: Reader) -> None:
    source = page.read_text(encoding="utf-8")
    assert "<script>alert(" not in source
    assert "<img src=x" not in source
    assert audits.HOSTILE in read.text  # In the tables.
    held = next(
        text for attributes, text in read.scripts if attributes.get("id") == "conversations"
    )
    shown = json.loads(held)["conversations"][0]["tokens"]
    assert shown[4] == audits.HOSTILE


def test_every_figure_has_words_beside_it(page: pathlib.Path) -> None:
    sections = re.findall(r"<section.*?</section>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(sections) == 9
    for section in sections:
        words = re.search(r'class="words">(.*?)</div>', section, re.DOTALL)
        assert words is not None
        assert re.search(r"\d", words[1]), section[:60]


def test_the_words_carry_the_numbers_of_the_data(audit: AuditFolder, read: Reader) -> None:
    columns = audit[1]
    noise = aggregates.in_noise_region(columns["rank"], columns["relative_rank"])
    share = {
        name: float(w[noise].sum(dtype=np.float64) / w.sum(dtype=np.float64))
        for name in ("ranktuner", "dft", "eaft", "sft")
        for w in [columns[f"weight/{name}"]]
    }
    assert f"{percent(float(noise.mean()))} of the tokens lie in the Noise Region" in read.text
    assert (
        f"RankTuner gives them {percent(share['ranktuner'])}, DFT {percent(share['dft'])}, "
        f"EAFT {percent(share['eaft'])}, SFT {percent(share['sft'])}."
    ) in read.text


def test_a_single_token_is_described_in_the_singular(
    audit: AuditFolder, tmp_path: pathlib.Path
) -> None:
    audits.cut_audit(audit[0], tmp_path, 1)
    text = report.write_audit_report(tmp_path).read_text(encoding="utf-8")
    assert "1 token it holds" in text
    assert "1 supervised token," in text
    assert "All tokens come from one source, gsm8k." in text
    assert not re.search(r"\b1 (tokens|conversations|token types)\b", text)
    assert "nan" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL).split()


def test_a_method_of_the_users_own_is_shown_under_its_name(
    audit: AuditFolder, tmp_path: pathlib.Path
) -> None:
    audits.cut_audit(audit[0], tmp_path, 40)
    table = pq.read_table(tmp_path / "tokens.parquet")
    own = "it's <b>mine</b>\\"
    table = table.append_column(f"weight/{own}", table["weight/dft"])
    pq.write_table(table, tmp_path / "tokens.parquet")
    about = json.loads((tmp_path / "audit.json").read_text())
    about["methods"].append(own)
    (tmp_path / "audit.json").write_text(json.dumps(about))
    lines = [json.loads(x) for x in (tmp_path / "conversations.jsonl").read_text().splitlines()]
    for line in lines:
        for token in line["tokens"]:
            if token["supervised"]:
                token["weights"][own] = 0.5
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    reader = Reader()
    reader.feed(report.write_audit_report(tmp_path).read_text(encoding="utf-8"))
    assert own in reader.text
    assert "b" not in reader.tags


def test_long_conversations_are_cut_at_one_length_to_fit_the_budget(audit: AuditFolder) -> None:
    lines = [json.loads(x) for x in (audit[0] / "conversations.jsonl").read_text().splitlines()]
    names = list(audits.METHODS)
    whole = encode(lines, names, [1.0] * len(names))
    cut = encode(lines, names, [1.0] * len(names), budget=60_000)
    lengths = {len(one["tokens"]) for one in cut["conversations"]}
    assert len(lengths) == 1
    assert len(json.dumps(cut["conversations"])) < 66_000 < len(json.dumps(whole["conversations"]))
    assert f"the first {lengths.pop()} of 45 tokens are shown" in cut["conversations"][0]["note"]
    assert "are shown" not in whole["conversations"][0]["note"]


def test_figures_are_written_as_pictures(audit: AuditFolder, tmp_path: pathlib.Path) -> None:
    paths = report.write_figures(audit[0], tmp_path / "figures")
    assert {path.stem for path in paths} >= {
        "plane",
        "rank",
        "expected_rank",
        "weights",
        "agreement",
    }
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["audit.json", "tokens.parquet", "conversations.jsonl"])
def test_an_unfinished_audit_is_refused_by_the_missing_file(
    audit: AuditFolder, tmp_path: pathlib.Path, missing: str
) -> None:
    for path in audit[0].iterdir():
        if path.name != missing:
            shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=f"without {missing}; run `ranktuner audit`"):
        report.write_audit_report(tmp_path)


def test_another_version_is_refused(audit: AuditFolder, tmp_path: pathlib.Path) -> None:
    for path in audit[0].iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "audit.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="expected version 1, got 2"):
        report.write_audit_report(tmp_path)


def test_an_audit_of_no_tokens_is_refused(audit: AuditFolder, tmp_path: pathlib.Path) -> None:
    audits.cut_audit(audit[0], tmp_path, 0)
    with pytest.raises(UserError, match="expected supervised tokens with a finite nll, got none"):
        report.write_audit_report(tmp_path)
