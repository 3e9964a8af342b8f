"""The report of a run: what stands on it, what it must never do, and what the command tells on the terminal."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_house import MODULES, imports, parsed, relative, room
from test_pipeline import ASK, SCORED, Place

from true_kd.cli.reporting import show, sparkline
from true_kd.errors import InputError
from true_kd.evaluation import Estimate
from true_kd.proof import Proof, Sample
from true_kd.report import build_report, figures, find_finished, formats, headline, read_chapter, write_report
from true_kd.report.tokens import LEVELS, shade
from true_kd.reporting import KDResult, read_result

EVIL = "</script></style></title>--><img src=x onerror=alert(1)><script>alert(1)</script>\"'&{{ 1 }}"
TASKS = tuple({"prompt": f"who said hello to cat {count}", "answer": "the mat"} for count in range(6))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """The output folder of a run over the domains `a`, with a control and tasks, and `b`; only looked at."""
    place = Place(tmp_path_factory.mktemp("report"), teacher_folder, student_folder, control="sft")
    place.config["training"] |= {"iters": 4}
    place.write("a", SCORED, TASKS)
    place.write("b", ASK, ASK)
    (place.root / "b.yaml").write_text("control: none\n")
    run = place.run("a", "b")
    assert run.failures == {}
    return place.out


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """A copy of the run without its report, to spoil."""
    return Path(shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("report.html", "checkpoint_*")))


@pytest.fixture
def result(out: Path) -> KDResult:
    found = read_result(out / "a")
    assert found is not None
    return found


@pytest.fixture
def proof(result: KDResult) -> Proof:
    assert result.proof is not None
    return result.proof


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """Tag, name and value of each."""
        self.scripts: list[str] = []
        self.data: list[Any] = []
        """What the scripts hold that are not run."""
        self.rows: list[list[str]] = []
        self.words = ""
        self._kind = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self._kind = dict(attrs).get("type") or "run"
        elif tag == "style":
            self._kind = "style"
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._kind = ""

    def handle_data(self, data: str) -> None:
        if self._kind == "run":
            self.scripts.append(data)
        elif self._kind == "application/json":
            self.data.append(json.loads(data))
        elif not self._kind:
            self.words += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += f" {data.strip()}"

    def row(self, name: str) -> list[str]:
        """The cells of the first row of that name, beside the name."""
        return next([" ".join(cell.split()) for cell in row[1:]] for row in self.rows if row and row[0].strip() == name)


def page_of(*results: KDResult, **failures: str) -> Page:
    return Page(build_report(results, failures))


def without_intervals(estimate: Estimate | None) -> Estimate | None:
    return estimate and Estimate(estimate.value)


def test_the_report_holds_every_part(result: KDResult) -> None:
    page = page_of(result)
    for part in (
        "Before and after",
        "Gap closed, by KL",
        "Kept of the teacher's likelihood",
        "Compression against the teacher",
        "Training loss",
        "On held-out prompts",
        "KL by place in the reply",
        "Agreement with the teacher",
        "Fidelity certificate",
        "Time",
        "Peak memory",
        "Best and worst examples",
        "Most gained",
        "Most left",
        "Data and settings",
    ):
        assert part in page.words, part
    assert result.proof is not None
    assert result.proof.verdict.sentence.partition(": ")[2][1:] in page.words


def test_several_domains_have_an_overview_and_a_section_each(out: Path) -> None:
    page = page_of(*find_finished(out).results)
    assert "All domains" in page.words
    targets = {value for _, name, value in page.attributes if name == "id"}
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links == {"#domain-1", "#domain-2"}
    assert links == {f"#{target}" for target in targets}


# Safety


def test_the_page_loads_nothing(out: Path) -> None:
    text = build_report(find_finished(out).results, {})
    page = Page(text)
    assert not {"link", "iframe", "img", "base", "form", "object", "embed"} & set(page.tags)
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset", "action", "data", "poster")]
    assert sources == []
    assert all(value.startswith("#") for _, name, value in page.attributes if name in ("href", "xlink:href"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_a_browser_may_run_the_two_scripts_of_the_page_and_no_other(result: KDResult) -> None:
    page = page_of(result)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert len(digests) == 2
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy.startswith("default-src 'none'; ")
    assert f"; script-src {allowed}; " in policy
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_plotly_stands_in_the_file_once(out: Path) -> None:
    from plotly.offline import get_plotlyjs

    text = build_report(find_finished(out).results, {})
    assert text.count(get_plotlyjs()[:2000]) == 1
    assert len(text) < len(get_plotlyjs()) + 300_000


def test_text_from_outside_stays_text(result: KDResult, proof: Proof) -> None:
    def told(text: str) -> tuple[KDResult, KDResult]:
        pieces = (text, *proof.samples[0].pieces[1:])
        sample = replace(proof.samples[0], prompt=text, pieces=pieces, where=text)
        missed = replace(proof.headroom.missed[0], text=text)
        headroom = replace(proof.headroom, why=text, missed=(missed,))
        verdict = replace(proof.verdict, sentence=text)
        spoilt = replace(proof, samples=(sample,), headroom=headroom, verdict=verdict)
        names = {"domain": text, "teacher": text, "student": text, "finished_at": text}
        changed = replace(result, **names, proof=spoilt, seconds={text: 1.0}, versions={text: text})
        return changed, replace(changed, domain=f"{text}2")

    harmless, hostile = page_of(*told("x"), x="x"), page_of(*told(EVIL), **{EVIL: EVIL})
    assert hostile.tags == harmless.tags
    assert [name for _, name, _ in hostile.attributes] == [name for _, name, _ in harmless.attributes]
    assert len(hostile.scripts) == 2
    assert len(hostile.data) == len(harmless.data)
    assert EVIL in hostile.words


def test_settings_from_outside_stay_text(copy: Path) -> None:
    run = copy / "a" / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "prompts": EVIL, EVIL: [EVIL]}))
    result = read_result(copy / "a")
    assert result is not None
    page = page_of(result)
    assert len(page.scripts) == 2
    assert "img" not in page.tags
    assert page.row("prompts") == [EVIL, "prompts"]


def test_characters_with_power_over_a_page_are_written_out(result: KDResult, proof: Proof) -> None:
    sample = replace(proof.samples[0], prompt="bell \x07 nul \x00 half \ud800 turn \u202e back")
    text = build_report([replace(result, proof=replace(proof, samples=(sample,)))], {})
    assert r"bell \x07 nul \x00 half \ud800 turn \u202e back" in text
    text.encode("utf-8")


# Numbers


def test_the_numbers_of_the_table_are_those_of_the_proof(result: KDResult, proof: Proof) -> None:
    page = page_of(result)
    models = {
        "student before": proof.student,
        "plain fine-tuning": proof.control,
        "distilled": proof.adapted,
        "teacher": proof.teacher,
    }
    for name, model in models.items():
        assert model is not None
        kl, _, top1, _, exact, parameters, *_ = page.row(name)
        assert float(kl.split()[0]) == pytest.approx(model.kl.value, abs=0.0051)
        if model is not proof.teacher:
            low, high = kl.split()[1::2]
            assert float(low) == pytest.approx(model.kl.low, abs=0.0051)
            assert float(high) == pytest.approx(model.kl.high, abs=0.0051)
        assert top1.split()[0] == formats.percent(model.top1_agreement.value)
        assert exact.split()[0] == formats.percent(model.exact_match.value)
        assert parameters == f"{model.parameters:,}"


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(0.17910616, 0.167598, 0.192051), "0.179 (0.168 to 0.192)"),
        (Estimate(0.3123, 0.11, 0.52), "0.31 (0.11 to 0.52)"),
        (Estimate(5.4321, 3.1, 8.2), "5.4 (3.1 to 8.2)"),
        (Estimate(123.4, 60.0, 190.0), "123 (60 to 190)"),
        (Estimate(0.0002, 0.0001, 0.0009), "<0.001 (<0.001 to 0.001)"),
        (Estimate(-0.0002, -0.002, 0.0009), ">-0.001 (-0.002 to 0.001)"),
        (Estimate(0.0, 0.0, 0.0), "0"),
        (Estimate(1.5), "1.500"),
        (Estimate(1e300), "over 10^6"),
        (None, "-"),
    ],
)
def test_a_number_has_the_digits_that_its_interval_supports(estimate: Estimate | None, shown: str) -> None:
    assert str(formats.number(estimate)) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0%"), (0.001, "<1%"), (0.494, "49%"), (0.9949, "99%"), (0.999, ">99%"), (1.0, "100%"), (-0.63, "-63%")],
)
def test_a_percentage_is_0_or_100_only_where_it_is_exact(value: float, shown: str) -> None:
    assert formats.percent(value) == shown


def test_an_interval_is_told_where_its_ends_read_differently() -> None:
    assert str(formats.share(Estimate(0.9992, 0.9973, 1.0))) == ">99% (>99 to 100)"
    assert str(formats.share(Estimate(0.501, 0.499, 0.504))) == "50%"
    assert str(formats.points(Estimate(0.01, -0.02, 0.03))) == "1 point (-2 to 3)"
    assert str(formats.number(Estimate(1.0006, 1.00055, 1.0007))) == "1.001"


def test_sizes_and_times_are_said_as_people_say_them() -> None:
    assert [formats.size(count) for count in (12, 107_260, 94_257_512, None)] == ["12 bytes", "107 kB", "94.3 MB", "-"]
    assert [formats.duration(seconds) for seconds in (2.84, 11.2, 59.7, 65.0, 7300.0)] == [
        "2.8 s",
        "11 s",
        "60 s",
        "1 min 5 s",
        "2 h 1 min",
    ]
    assert [formats.amount(count) for count in (26112, 7_615_616_512)] == ["26,112", "7.62 billion"]
    assert [formats.places(*ends) for ends in ((0, 1), (4, 8))] == ["0", "4–7"]


# What is not there


def test_a_domain_that_was_not_measured_says_so(result: KDResult) -> None:
    page = page_of(replace(result, proof=None, fidelity=None))
    assert "not measured" in page.words
    assert "No certificate" in page.words
    assert page.row("student before")[0] == f"{result.before.kl:.3f}"
    assert len(page.data) == 2


def test_a_measure_that_is_missing_leaves_the_others(result: KDResult, proof: Proof) -> None:
    def bare(scores: Any) -> Any:
        measures = ("kl", "nll", "perplexity", "top1_agreement", "top5_agreement")
        kept = {name: without_intervals(getattr(scores, name)) for name in measures}
        return replace(scores, **kept, exact_match=None, parameters=None, bytes=None, tokens_per_second=None)

    few = replace(
        proof,
        tasks=0,
        student=bare(proof.student),
        adapted=bare(proof.adapted),
        teacher=bare(proof.teacher),
        control=None,
        gap_closed=replace(proof.gap_closed, kl=None, nll=None, exact_match=None),
        control_gap_closed=None,
        against_control=None,
        retention=replace(proof.retention, likelihood=None, exact_match=None),
        footprint=replace(proof.footprint, parameter_ratio=None, byte_ratio=None, speed_up=None),
        headroom=replace(proof.headroom, first_miss=None, missed=()),
        by_position=tuple(replace(stretch, control=None) for stretch in proof.by_position),
        samples=(),
        verdict=replace(proof.verdict, against_control=None, sentence="a: too few."),
    )
    changed = replace(result, proof=few, capture_peak_memory=0, seconds={"training": 0.0})
    page = page_of(changed, replace(changed, domain="z"))
    assert page.row("distilled")[0] == f"{proof.adapted.kl.value:.3f}"
    assert "plain fine-tuning" not in page.words
    assert "Best and worst" not in page.words
    assert "None" not in page.words


def test_a_run_in_which_all_failed_has_a_report_too(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, [], {"a": "no such folder."}).read_text())
    assert "1 domain failed (a)." in page.words
    assert "no such folder." in page.words


# The sentence above all


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        ("helped", "Distillation helped in a."),
        ("hurt", "Distillation hurt in a."),
        ("helped/level", "Distillation helped in a; level with plain fine-tuning."),
        ("helped helped", "Distillation helped in all 2 domains (a and b)."),
        (
            "helped/ahead helped/level unclear/level",
            "Distillation helped in 2 of 3 domains (a and b); it is unclear in c; ahead of plain fine-tuning in 1, "
            "level in 2.",
        ),
        (
            "hurt/behind mixed/behind",
            "Distillation helped in none of 2 domains; it led nearer to the teacher, but to fewer tasks right, in b; "
            "it hurt in a; behind plain fine-tuning in all.",
        ),
        ("-", "Whether it helped was not measured in a."),
        ("helped -", "Distillation helped in a; whether it helped was not measured in b."),
    ],
)
def test_the_headline_tells_what_came_of_all_domains(
    outcomes: str, sentence: str, result: KDResult, proof: Proof
) -> None:
    results = []
    for domain, outcome in zip("abc", outcomes.split(), strict=False):
        name, _, place = outcome.partition("/")
        verdict = replace(proof.verdict, outcome=name, against_control=place or None)
        results.append(replace(result, domain=domain, proof=None if name == "-" else replace(proof, verdict=verdict)))
    assert headline(results, {}) == sentence


def test_the_headline_counts_what_failed(result: KDResult) -> None:
    words = headline([result], {"b": "x", "c": "x"})
    assert words.endswith("; 2 domains failed (b and c).")


def test_the_headline_names_no_more_than_a_handful_of_domains(result: KDResult, proof: Proof) -> None:
    verdict = replace(proof.verdict, outcome="helped", against_control=None)
    many = [replace(result, domain=f"d{at}", proof=replace(proof, verdict=verdict)) for at in range(20)]
    assert headline(many, {}) == "Distillation helped in all 20 domains (d0, d1, d2, d3, d4 and 15 more)."


# Figures


def traces(figure: figures.Figure) -> dict[str, Any]:
    return {trace["name"]: trace for trace in json.loads(figure.plot.to_json())["data"]}


def test_the_curves_are_those_of_the_run_and_its_control(out: Path, result: KDResult) -> None:
    chapter = read_chapter(result)
    control = read_result(out / "a" / "control_sft")
    assert control is not None
    drawn = traces(figures.validation_curves(chapter))
    for name, run in (("distilled", result), ("plain fine-tuning", control)):
        for measure in ("kl", "ce"):
            found = [getattr(point.metrics, measure) for point in run.validations]
            assert drawn[f"{name}, {measure.upper()}"]["y"] == pytest.approx(found, rel=1e-3)
    losses = traces(figures.training_curves(result))
    assert losses["total"]["y"] == pytest.approx([step.total for step in result.steps], rel=1e-3)
    assert losses["total, held out"]["x"] == [0, 2, 4]


def test_a_long_curve_is_smoothed_and_stays_small(result: KDResult) -> None:
    step = result.steps[0]
    steps = tuple(replace(step, iteration=at + 1, total=1.0 + (at % 2), kd=2.0, ce=3.0) for at in range(10_000))
    figure = figures.training_curves(replace(result, steps=steps))
    smooth = [trace for trace in json.loads(figure.plot.to_json())["data"] if trace["name"] == "total"][-1]
    assert np.allclose(smooth["y"][10:-10], 1.5, atol=0.01)
    assert len(figure.plot.to_json()) < 100_000


def test_agreement_is_drawn_with_its_intervals(proof: Proof) -> None:
    drawn = traces(figures.agreement(proof))["distilled"]
    assert drawn["x"][0] == pytest.approx(100 * proof.adapted.top1_agreement.value, rel=1e-3)
    reach = 100 * (proof.adapted.top1_agreement.high - proof.adapted.top1_agreement.value)
    assert drawn["error_x"]["array"][0] == pytest.approx(reach, abs=0.05)


def test_a_token_is_shaded_by_its_distance_before_and_after() -> None:
    sample = Sample("best", "x:1", "why", (" a", "\n", "", "b"), (LEVELS[0], 9.0, None, -0.1), (0.0, 0.3, 0.2, 0.02))
    shaded = shade(sample)
    assert [token.before for token in shaded.tokens] == ["k1", "k7", "unknown", "k0"]
    assert [token.after for token in shaded.tokens] == ["k0", "k3", "k2", "k0"]
    assert [token.text for token in shaded.tokens] == [" a", "↵\n", "", "b"]
    assert shaded.tokens[0].title == "KL 0.030 before, 0.000 after"
    assert shaded.after == pytest.approx(0.13)


# What lies under a folder


def test_settings_that_differ_from_the_defaults_are_named_with_them(result: KDResult) -> None:
    chapter = read_chapter(result)
    changed = {setting.key: (setting.value, setting.default) for setting in chapter.changed}
    assert changed["lora.rank"] == ("2", "16")
    assert changed["control"] == ("sft", "none")
    assert "losses.alpha" not in changed
    assert "losses.alpha" in {setting.key for setting in chapter.settings}
    assert page_of(result).row("lora.rank") == ["2", "16"]


def test_a_folder_of_domains_and_that_of_one_are_both_found(out: Path) -> None:
    assert [result.domain for result in find_finished(out).results] == ["a", "b"]
    assert [result.domain for result in find_finished(out / "b").results] == ["b"]


def test_a_domain_that_cannot_be_read_is_named_and_the_others_stay(copy: Path) -> None:
    (copy / "b" / "kd_metrics.json").write_text("{")
    found = find_finished(copy)
    assert [result.domain for result in found.results] == ["a"]
    assert "Distil it again" in found.failures["b"]
    assert "Distil it again" in page_of(*found.results, **found.failures).words


def test_failures_of_the_last_run_are_told_until_the_domain_is_finished(copy: Path) -> None:
    summary = json.loads((copy / "kd_summary.json").read_text())
    summary["failed"] = {"a": "was locked.", "c": "no prompts."}
    (copy / "kd_summary.json").write_text(json.dumps(summary))
    assert find_finished(copy).failures == {"c": "no prompts."}


def test_a_run_over_one_domain_keeps_the_others_in_the_report(copy: Path) -> None:
    result = read_result(copy / "b")
    assert result is not None
    path = write_report(copy, [result], {})
    assert path == copy / "report.html"
    assert {"a", "b"} <= {row[0].strip() for row in Page(path.read_text()).rows if row}
    failed = Page(write_report(copy, [result], {"a": "out of memory."}).read_text())
    assert "1 domain failed (a)" in failed.words


def test_a_domain_without_the_files_beside_it_is_still_reported(copy: Path) -> None:
    (copy / "a" / "run.json").unlink()
    shutil.rmtree(copy / "a" / "control_sft")
    result = read_result(copy / "a")
    assert result is not None
    assert "settings of this domain were not kept" in page_of(result).words


@pytest.mark.parametrize("spoil", ["missing", "a file", "empty", "above", "damaged"])
def test_a_folder_without_a_finished_domain_is_refused_in_one_line(spoil: str, copy: Path) -> None:
    folder = copy / "none"
    if spoil == "a file":
        folder.write_text("x")
    elif spoil == "empty":
        folder.mkdir()
    elif spoil == "above":
        folder = copy.parent
    elif spoil == "damaged":
        folder.mkdir()
        (folder / "kd_metrics.json").write_text("{}")
    with pytest.raises(InputError) as refused:
        find_finished(folder)
    line = str(refused.value)
    assert line.startswith(f"{folder}: ")
    assert ", expected " in line
    assert line.endswith(".")
    assert "\n" not in line
    if spoil == "above":
        assert f"Try {copy}." in line


# The command


def told(results: tuple[KDResult, ...], width: int, encoding: str = "utf-8", **failures: str) -> list[str]:
    """The lines that a console of some width shows."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(Console(file=stream, width=width, color_system=None), results, failures, Path("report.html"))
    stream.seek(0)
    return stream.read().splitlines()


def test_the_command_writes_the_page_and_tells_the_gist(cli, copy: Path, result: KDResult) -> None:
    ended = cli("report", str(copy))
    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    assert result.proof is not None
    assert result.proof.verdict.sentence in ended.out
    assert re.search(r"training loss +[▁▂▃▄▅▆▇█]{4} ", ended.out)
    assert re.search(r"KL before +[▁▂▃▄▅▆▇█]+ ", ended.out)
    assert ended.out.splitlines()[-1] == f"Report: {copy / 'report.html'}"
    assert "Distillation report" in Page((copy / "report.html").read_text()).words


def test_the_page_of_one_domain_lies_in_its_folder(cli, copy: Path) -> None:
    assert cli("report", str(copy / "a")).code == 0
    assert (copy / "a" / "report.html").is_file()
    assert not (copy / "report.html").exists()


def test_the_page_can_be_put_elsewhere_or_left_out(cli, copy: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "pages" / "mine.html"
    assert cli("report", str(copy), "-d", "a", "--html", str(elsewhere)).code == 0
    assert 'id="domain-1"' in elsewhere.read_text()
    assert 'id="domain-2"' not in elsewhere.read_text()
    assert "Report:" not in cli("report", str(copy), "--no-html").out
    assert not (copy / "report.html").exists()


def test_json_is_that_of_the_summary(cli, copy: Path) -> None:
    told = json.loads(cli("report", str(copy), "--json", "--no-html").out)
    summary = json.loads((copy / "kd_summary.json").read_text())
    assert set(told["domains"]) == {"a", "b"}
    for name, record in told["domains"].items():
        assert record["proof"] == summary["domains"][name]["proof"]
        assert set(record) == set(summary["domains"][name])
    assert told["failed"] == {}


def test_without_a_folder_that_of_the_base_config_is_reported(
    cli, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("report").err.startswith("adapters_kd: no such folder")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text(f"out: {copy.name}\n")
    assert cli("report").out.splitlines()[-1] == f"Report: {copy.name}/report.html"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-d", "aa"], "--domain 'aa': no finished domain of this name. Domains here: a, b."),
        (["--html", "x.html", "--no-html"], "--html 'x.html': together with --no-html, expected one of them."),
        (["--html", "."], "--html '.': a folder, expected the name of a file."),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(arguments: list[str], line: str, cli, copy: Path) -> None:
    ended = cli("report", str(copy), *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert line in ended.err
    assert ended.err.count("\n") == 1
    assert not (copy / "report.html").exists()


def test_nothing_is_wider_than_60_columns(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    lines = told(find_finished(Path(out.name)).results, 60, c="no prompts were found in the folder of this domain.")
    assert max(map(len, lines)) <= 60
    assert any("gap closed" in line for line in lines)
    assert any("training loss" in line for line in lines)


def test_where_there_is_room_each_domain_is_one_row(out: Path) -> None:
    lines = told(find_finished(out).results, 400)
    assert sum("KL to teacher" in line and "gap closed" in line for line in lines) == 1


def test_an_encoding_without_blocks_gets_plain_characters(out: Path, result: KDResult) -> None:
    lines = told((result, replace(result, domain="c", proof=None)), 100, encoding="ascii")
    assert all(line.isascii() for line in lines)
    assert any(re.search(r"training loss +[_.:=+*#-]{4} ", line) for line in lines)


def test_a_sparkline_is_as_long_as_asked_and_reaches_both_ends() -> None:
    line = sparkline([float(at) for at in range(100)], [0.0, 99.0], 8, plain=False)
    assert line == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 2.0], [0.0, 8.0], 40, plain=True) == ".:"
    assert sparkline([3.0], [3.0], 40, plain=False) == "▁"


# The house


def test_plotly_is_known_to_the_report_alone_and_imported_late() -> None:
    for name, path in MODULES.items():
        if room(name) != "report":
            assert "plotly" not in {room(found) for found in imports(path)}, name
        eager = [node for node in parsed(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("plotly" in ast.unparse(node) for node in eager), relative(path)


def test_the_parts_of_the_page_lie_in_the_package() -> None:
    folder = Path(figures.__file__).parent
    assert {"page.css", "page.html.jinja", "page.js"} <= set(names_in(folder))


def names_in(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir())
