"""A budget on disk is kept and used: the threshold it picks is the finest that fits, and stays when prompts change."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import ASK, CHECK, Place

from true_kd import events, pipeline, pocket
from true_kd.budget import THRESHOLDS, Demand, choose_settings, demand_path, measure, read_demand, write_demand
from true_kd.cache import TargetCache
from true_kd.capture import CaptureOptions, capture, render_for, teacher_identity
from true_kd.config import Override
from true_kd.errors import InputError
from true_kd.jobs import plan
from true_kd.manifest import MANIFEST, SHARD
from true_kd.models import LanguageModel, ModelOptions, generate_replies, open_model
from true_kd.prompts import Prompt, from_records, from_strings
from true_kd.shards import estimate_bytes
from true_kd.targets import TargetOptions, TargetSettings

GREEDY = CaptureOptions(sampling_temperature=0.0, max_tokens=64, batch_size=64)
DEMAND = Demand(tuple(1.0 + 0.3 / threshold**0.9 for threshold in THRESHOLDS), 20.0, 600)
"""Made up: 1.6 entries at a threshold of 0.5, 150 at 0.001."""
VOCAB = 768


@pytest.fixture(autouse=True, scope="module")
def fast_collection() -> Iterator[None]:
    """What tests import is set aside: looking through it takes a quarter of the time of each run here."""
    gc.freeze()
    yield
    gc.unfreeze()


def choose(demand: Demand = DEMAND, replies: int = 100, **options: Any) -> Any:
    return choose_settings(TargetOptions(**options), GREEDY, VOCAB, replies, demand)


# From a measurement to a threshold


def test_the_finest_threshold_that_fits_is_chosen() -> None:
    sizes = {threshold: size_at(threshold) for threshold in THRESHOLDS}
    for budget in (14.0, 25.0, 50.0, 110.0):
        found = choose(bytes_per_token=budget)
        assert found.settings.threshold == min(threshold for threshold, size in sizes.items() if size <= budget)
        assert found.bytes_per_token == sizes[found.settings.threshold]


def size_at(threshold: float) -> float:
    """Bytes per token at a threshold."""
    settings = replace(TargetOptions().settings, threshold=threshold)
    entries = DEMAND.entries[THRESHOLDS.index(threshold)]
    return estimate_bytes(entries, settings, VOCAB, DEMAND.reply_tokens, GREEDY.shard_prompts)


def test_a_larger_budget_is_never_coarser_nor_smaller() -> None:
    found = [choose(bytes_per_token=float(budget)) for budget in range(14, 400, 4)]
    thresholds = [choice.settings.threshold for choice in found]
    assert thresholds == sorted(thresholds, reverse=True)
    assert len(set(thresholds)) > 10
    sizes = [choice.bytes_per_token for choice in found]
    assert sizes == sorted(sizes)


def test_more_gigabytes_than_are_needed_are_not_used() -> None:
    found = choose(gigabytes=1000.0)
    assert found.settings.threshold == THRESHOLDS[-1]
    assert found.gigabytes < 0.001


@pytest.mark.parametrize("budget", [15.0, 40.0, 120.0])
def test_gigabytes_are_bytes_per_token_times_all_tokens(budget: float) -> None:
    expected = choose(bytes_per_token=budget, replies=250)
    found = choose(gigabytes=budget * 250 * DEMAND.reply_tokens / 1e9 * (1 + 1e-9), replies=250)
    assert found == expected
    assert found.gigabytes == pytest.approx(found.bytes_per_token * 250 * DEMAND.reply_tokens / 1e9)


@pytest.mark.parametrize(("per_token", "in_all"), [(20.0, 60.0), (60.0, 20.0)])
def test_of_two_budgets_the_tighter_one_holds(per_token: float, in_all: float) -> None:
    found = choose(bytes_per_token=per_token, gigabytes=in_all * 100 * DEMAND.reply_tokens / 1e9)
    assert found.settings == choose(bytes_per_token=20.0).settings


@pytest.mark.parametrize("options", [{"draw_temperature": 4.0}, {"share": 0.4}, {"preset": "tiny"}], ids=str)
def test_all_but_the_threshold_stays_as_it_was_set(options: dict[str, Any]) -> None:
    found = choose(bytes_per_token=60.0, **options).settings
    assert replace(found, threshold=0.0) == replace(TargetOptions(**options).settings, threshold=0.0)


def test_a_smaller_share_affords_a_finer_threshold() -> None:
    whole, half = (choose(bytes_per_token=40.0, share=share).settings.threshold for share in (1.0, 0.5))
    assert half < whole


def least_of(refusal: pytest.ExceptionInfo[InputError]) -> float:
    """The smallest budget that a refusal names."""
    return float(str(refusal.value).partition("at least ")[2].partition(" ")[0])


def test_a_budget_that_is_too_small_is_refused_with_the_least_there_is() -> None:
    with pytest.raises(InputError) as refusal:
        choose(bytes_per_token=4.0)
    least = least_of(refusal)
    assert "\n" not in str(refusal.value)
    assert choose(bytes_per_token=least + 0.1).settings.threshold == THRESHOLDS[0]
    with pytest.raises(InputError):
        choose(bytes_per_token=least - 0.1)


def test_the_least_that_a_refusal_names_is_accepted() -> None:
    for entries in np.arange(1.0, 1.2, 0.02):
        demand = replace(DEMAND, entries=(float(entries), *DEMAND.entries[1:]))
        with pytest.raises(InputError) as refusal:
            choose(demand, bytes_per_token=4.0)
        assert choose(demand, bytes_per_token=least_of(refusal))


def test_too_few_gigabytes_are_answered_in_gigabytes() -> None:
    with pytest.raises(InputError, match=r"expected at least [0-9.e-]+ (GB|gigabytes)"):
        choose(gigabytes=1e-9)


def test_every_threshold_of_a_budget_can_be_set_by_hand() -> None:
    for threshold in THRESHOLDS:
        TargetOptions(threshold=threshold)


# A measurement on disk


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_demand(tmp_path / "demand.json", DEMAND)
    assert read_demand(tmp_path / "demand.json") == DEMAND


def written(**changes: Any) -> bytes:
    record = {"entries": list(DEMAND.entries), "reply_tokens": 20.0, "tokens": 600, **changes}
    return json.dumps({name: value for name, value in record.items() if value is not None}).encode()


DAMAGED = {
    "empty": b"",
    "cut": written()[:100],
    "a list": b"[1, 2]",
    "null": b"null",
    "no JSON": b"\xff\xfe\0",
    "no entries": written(entries=None),
    "too few entries": written(entries=[2.0]),
    "too many entries": written(entries=[2.0] * 99),
    "words": written(entries=["many"] * len(THRESHOLDS)),
    "negative": written(entries=[-1.0] * len(THRESHOLDS)),
    "zero tokens": written(reply_tokens=0),
    "no count": written(tokens=None),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_measurement_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "demand.json").write_bytes(content)
    assert read_demand(tmp_path / "demand.json") is None


@pytest.mark.parametrize(
    "content",
    [
        written(reply_tokens=float("nan")),
        written(reply_tokens=float("inf")),
        written(tokens=float("inf")),
        written(entries=[*DEMAND.entries[:-1], float("nan")]),
    ],
    ids=["NaN tokens", "infinite tokens", "infinite count", "NaN entries"],
)
def test_a_measurement_that_is_not_finite_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "demand.json").write_bytes(content)
    assert read_demand(tmp_path / "demand.json") is None


def test_where_there_is_no_measurement_there_is_none(tmp_path: Path) -> None:
    assert read_demand(tmp_path / "demand.json") is None
    (tmp_path / "demand.json").mkdir()
    assert read_demand(tmp_path / "demand.json") is None


@pytest.fixture(scope="module")
def pocket_teacher() -> LanguageModel:
    if not pocket.locate("pocket:teacher", "teacher").is_dir():
        pytest.skip("the pocket models are not built yet")
    return open_model(ModelOptions(model="pocket:teacher"), "teacher")


def path_of(
    teacher: LanguageModel, options: dict[str, Any] | None = None, capturing: dict[str, Any] | None = None
) -> Path:
    targets = TargetOptions(**({"bytes_per_token": 30.0} | (options or {})))
    return demand_path(targets, GREEDY.model_copy(update=capturing or {}), teacher, Path())


@pytest.mark.parametrize(
    ("options", "capturing"),
    [
        ({"bytes_per_token": 99.0}, {}),
        ({"bytes_per_token": None, "gigabytes": 2.0}, {}),
        ({"preset": "default", "draw_temperature": 2.0}, {}),
        ({}, {"batch_size": 3}),
        ({}, {"shard_prompts": 3}),
        ({}, {"seed": 3}),
    ],
    ids=str,
)
def test_a_measurement_serves_every_budget_of_the_same_replies(
    options: dict[str, Any], capturing: dict[str, Any], pocket_teacher: LanguageModel
) -> None:
    assert path_of(pocket_teacher, options, capturing) == path_of(pocket_teacher)


@pytest.mark.parametrize(
    ("options", "capturing"),
    [
        ({"draw_temperature": 4.0}, {}),
        ({"preset": "tiny"}, {}),
        ({"share": 0.5}, {}),
        ({}, {"max_tokens": 7}),
        ({}, {"sampling_temperature": 1.0}),
    ],
    ids=str,
)
def test_what_changes_entries_or_replies_is_measured_anew(
    options: dict[str, Any], capturing: dict[str, Any], pocket_teacher: LanguageModel
) -> None:
    assert path_of(pocket_teacher, options, capturing) != path_of(pocket_teacher)


def test_another_teacher_is_measured_anew(pocket_teacher: LanguageModel, teacher: LanguageModel) -> None:
    assert path_of(teacher) != path_of(pocket_teacher)


# Expected and actual size


DOMAINS = ("thinking", "memory", "task")


@pytest.fixture(scope="module")
def answered(pocket_teacher: LanguageModel) -> dict[str, list[Prompt]]:
    """Forty prompts of each domain with the pocket teacher's own replies as completions."""
    folder = pocket.locate("pocket:prompts", "prompts")
    asked = [
        (domain, json.loads(line)["prompt"])
        for domain in DOMAINS
        for line in (folder / domain / "train.jsonl").read_text().splitlines()[:40]
    ]
    rendered = render_for(pocket_teacher, from_strings([prompt for _, prompt in asked]), GREEDY)
    *_, (_, replies) = generate_replies(
        pocket_teacher, [item.rendered.prompt for item in rendered], GREEDY, [0] * len(rendered)
    )
    found: dict[str, list[dict[str, str]]] = {domain: [] for domain in DOMAINS}
    for (domain, prompt), reply in zip(asked, replies, strict=True):
        said = [token for token in reply.tokens if token not in pocket_teacher.stop_ids]
        found[domain].append({"prompt": prompt, "completion": pocket_teacher.tokenizer.decode(said)})
    return {domain: from_records(records) for domain, records in found.items()}


def actual_bytes(
    teacher: LanguageModel, prompts: Sequence[Prompt], settings: TargetSettings, root: Path, **options: Any
) -> float:
    """Bytes on disk per response token, of shards and their manifest."""
    capturing = GREEDY.model_copy(update=options)
    asked = render_for(teacher, prompts, capturing)
    cache = TargetCache(root, teacher_identity(teacher, settings))
    for _ in capture(teacher, asked, cache, capturing, settings):
        pass
    files = [path for path in cache.folder.iterdir() if SHARD.fullmatch(path.name) or path.name == MANIFEST]
    return sum(path.stat().st_size for path in files) / cache.count_tokens({item.key for item in asked})


def expected(teacher: LanguageModel, prompts: Sequence[Prompt], options: TargetOptions, **capturing: Any) -> Any:
    """What a budget chooses for the prompts."""
    how = GREEDY.model_copy(update=capturing)
    demand = measure(teacher, render_for(teacher, prompts, how), how, options.settings)
    return choose_settings(options, how, teacher.size, len(prompts), demand)


@pytest.mark.parametrize(
    ("domain", "budget", "options"),
    [
        ("thinking", 20.0, {}),
        ("thinking", 40.0, {"draw_temperature": 4.0}),
        ("memory", 80.0, {}),
        ("memory", 30.0, {"share": 0.5}),
        ("task", 40.0, {}),
        ("task", 20.0, {"share": 0.5, "draw_temperature": 4.0}),
    ],
    ids=str,
)
def test_the_cache_takes_what_was_expected(
    domain: str,
    budget: float,
    options: dict[str, Any],
    pocket_teacher: LanguageModel,
    answered: dict[str, list[Prompt]],
    tmp_path: Path,
) -> None:
    choice = expected(pocket_teacher, answered[domain], TargetOptions(bytes_per_token=budget, **options))
    found = actual_bytes(pocket_teacher, answered[domain], choice.settings, tmp_path)
    assert choice.bytes_per_token <= budget
    assert found == pytest.approx(choice.bytes_per_token, rel=0.15)
    assert found < 1.1 * budget


def test_replies_that_the_teacher_writes_take_what_was_expected(
    pocket_teacher: LanguageModel, answered: dict[str, list[Prompt]], tmp_path: Path
) -> None:
    prompts = [replace(prompt, completion=None) for prompt in answered["task"]]
    choice = expected(pocket_teacher, prompts, TargetOptions(bytes_per_token=40.0), sampling_temperature=1.0)
    found = actual_bytes(pocket_teacher, prompts, choice.settings, tmp_path, sampling_temperature=1.0)
    assert found == pytest.approx(choice.bytes_per_token, rel=0.15)


def test_a_share_of_short_replies_takes_what_was_expected(
    pocket_teacher: LanguageModel, answered: dict[str, list[Prompt]], tmp_path: Path
) -> None:
    options = TargetOptions(bytes_per_token=30.0, share=0.05)
    choice = expected(pocket_teacher, answered["memory"], options)
    assert actual_bytes(pocket_teacher, answered["memory"], choice.settings, tmp_path) < 1.2 * choice.bytes_per_token


def test_measuring_replies_that_are_written_or_given_is_the_same(
    pocket_teacher: LanguageModel, answered: dict[str, list[Prompt]]
) -> None:
    base = TargetOptions().settings
    given = answered["task"][:16]
    asked = [replace(prompt, completion=None) for prompt in given]
    found, known = (
        measure(pocket_teacher, render_for(pocket_teacher, prompts, GREEDY), GREEDY, base) for prompts in (asked, given)
    )
    assert (found.tokens, found.reply_tokens) == (known.tokens, known.reply_tokens)
    assert found.entries == pytest.approx(known.entries, rel=0.02)


def test_written_and_given_replies_are_measured_together(
    pocket_teacher: LanguageModel, answered: dict[str, list[Prompt]]
) -> None:
    # Of so few, given replies are measured whole as well.
    given = answered["task"][:16]
    mixed = [replace(prompt, completion=None) if number % 2 else prompt for number, prompt in enumerate(given)]
    found, known = (
        measure(pocket_teacher, render_for(pocket_teacher, prompts, GREEDY), GREEDY, TargetOptions().settings)
        for prompts in (mixed, given)
    )
    assert (found.tokens, found.reply_tokens) == (known.tokens, known.reply_tokens)


def test_finer_thresholds_need_more_entries(pocket_teacher: LanguageModel, answered: dict[str, list[Prompt]]) -> None:
    rendered = render_for(pocket_teacher, answered["thinking"], GREEDY)
    entries = measure(pocket_teacher, rendered, GREEDY, TargetOptions().settings).entries
    assert list(entries) == sorted(entries)
    assert 1.0 <= entries[0] < entries[-1] < VOCAB


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (10, 10),
        (200, 200),
        (32, 31),
    ],
)
def test_what_is_measured_is_spread_over_all_prompts(short: int, long: int, teacher: LanguageModel) -> None:
    """The prompts of domains come one domain after the other."""
    records = [{"prompt": f"hi {number}", "completion": "hello"} for number in range(short)]
    records += [{"prompt": f"said {number}", "completion": "hello to the world " * 5} for number in range(long)]
    rendered = render_for(teacher, from_records(records), GREEDY)
    found = measure(teacher, rendered, GREEDY, TargetOptions().settings)
    lengths = [len(item.rendered.response) for item in rendered]
    assert found.reply_tokens == pytest.approx(np.mean(lengths), rel=0.1)


def test_of_long_replies_more_than_the_first_is_measured(teacher: LanguageModel) -> None:
    texts = from_records([{"text": "hello " * 1100}, {"text": "the cat sat on the mat " * 300}])
    rendered = render_for(teacher, texts, GREEDY)
    base = TargetOptions().settings
    assert min(len(item.rendered.response) for item in rendered) > 1024
    assert measure(teacher, rendered, GREEDY, base).entries != measure(teacher, rendered[:1], GREEDY, base).entries


# A run


class Budgeted(Place):
    """A place whose domains share a budget."""

    def capture(self, *domains: str, **changes: Any) -> list[events.Event]:
        """Run the teacher's phase alone."""
        base = self.root / "base.yaml"
        base.write_text(json.dumps(self.config))
        overrides = [Override("--set", tuple(name.split("__")), value) for name, value in changes.items()]
        return list(pipeline.capture(*plan(base, domains, overrides)))

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def measurements(self) -> list[Path]:
        """Where the measurement lies: beside the caches, and in the one that was made by it."""
        return sorted(self.cache.rglob("demand-*.json"))

    @property
    def identities(self) -> set[str]:
        return {path.parent.name for path in self.cache.glob("*/identity.json")}

    @property
    def shard_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.cache.rglob("*") if SHARD.fullmatch(path.name))


def of(kind: type, seen: Sequence[events.Event]) -> list[Any]:
    return [event for event in seen if isinstance(event, kind)]


def failures_of(seen: Sequence[events.Event]) -> dict[str, str]:
    return {event.domain: str(event.error) for event in of(events.DomainFailed, seen)}


@pytest.fixture
def place(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Budgeted:
    place = Budgeted(tmp_path, teacher_folder, student_folder, targets={"bytes_per_token": 60.0})
    place.write("a")
    return place


def test_a_run_says_what_its_budget_chose_before_it_captures(place: Budgeted) -> None:
    seen = place.capture("a")
    kinds = [type(event) for event in seen]
    assert kinds.index(events.TeacherOpening) < kinds.index(events.BudgetChosen) < kinds.index(events.Captured)
    assert kinds.count(events.TeacherOpening) == 1
    [event] = of(events.BudgetChosen, seen)
    identity = json.loads(next(place.cache.glob("*/identity.json")).read_text())
    assert identity["targets"]["threshold"] == event.choice.settings.threshold
    [captured] = of(events.DomainCaptured, seen)
    assert captured.tokens * event.choice.bytes_per_token == pytest.approx(1e9 * event.choice.gigabytes, rel=0.1)


def test_an_edited_prompt_keeps_the_threshold_and_captures_only_itself(place: Budgeted) -> None:
    place.capture("a")
    before = place.identities
    place.write("a", ["hello to the world", *ASK[1:]])
    seen = place.capture("a")
    assert place.identities == before
    assert of(events.Captured, seen)[0].progress.done == len(ASK) + len(CHECK) - 1


@pytest.mark.parametrize("budget", [{"bytes_per_token": 60.0}, {"gigabytes": 1e-6}], ids=str)
def test_where_all_is_cached_the_teacher_stays_closed(budget: dict[str, float], place: Budgeted) -> None:
    place.config["targets"] = budget
    place.capture("a")
    seen = place.capture("a")
    assert of(events.TeacherOpening, seen) == []
    assert of(events.CaptureReused, seen)
    assert len(of(events.BudgetChosen, seen)) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", None], ids=str)
def test_a_damaged_measurement_is_made_again_and_comes_out_the_same(content: bytes | None, place: Budgeted) -> None:
    place.capture("a")
    before = place.identities
    contents = {path.read_bytes() for path in place.measurements}
    for path in place.measurements:
        path.write_bytes(content) if content is not None else path.unlink()
    seen = place.capture("a")
    assert of(events.TeacherOpening, seen)
    assert {path.read_bytes() for path in place.measurements} == contents
    assert len(contents) == 1
    assert place.identities == before
    assert of(events.CaptureReused, seen)


def test_two_domains_share_a_measurement_a_threshold_and_a_cache(place: Budgeted) -> None:
    place.write("b", ["who said hello", "where is the cat", *ASK[:1]])
    seen = place.capture("a", "b")
    assert len(of(events.BudgetChosen, seen)) == 1
    assert len({path.name for path in place.measurements}) == 1
    assert len(place.identities) == 1
    assert {event.domain for event in of(events.DomainCaptured, seen)} == {"a", "b"}


def test_a_domain_that_comes_later_takes_the_measurement_of_the_first(place: Budgeted) -> None:
    place.write("b", ["who said hello", "where is the cat"])
    place.capture("a")
    place.capture("b")
    assert len({path.name for path in place.measurements}) == 1
    assert len(place.identities) == 1


def test_replies_of_every_kind_fit_a_budget(place: Budgeted) -> None:
    place.write("a", [*ASK, {"prompt": "hi", "completion": "the cat sat"}, {"text": "hello to the world"}])
    run = place.run("a", targets__share=0.5, targets__draw_temperature=4.0)
    assert run.failures == {}
    assert len(run.of(events.BudgetChosen)) == 1


def test_training_takes_the_threshold_of_the_budget(place: Budgeted) -> None:
    run = place.run("a")
    [event] = run.of(events.BudgetChosen)
    by_hand = Budgeted(place.root / "by hand", Path(place.config["teacher"]), Path(place.config["student"]))
    by_hand.config["targets"] = {"threshold": event.choice.settings.threshold}
    by_hand.write("a")
    by_hand.run("a")
    assert by_hand.weights() == place.weights()


def test_a_budget_that_is_too_small_captures_nothing(place: Budgeted) -> None:
    seen = place.capture("a", targets__bytes_per_token=5.0)
    assert failures_of(seen)["a"].startswith("cache budget: 5 bytes per token, expected at least ")
    assert place.identities == set()
    assert of(events.CaptureFinished, seen)[0].domains == ()


def test_a_finer_budget_makes_a_larger_cache(place: Budgeted) -> None:
    sizes = []
    for budget in (40.0, 80.0, 200.0):
        place.config["cache"] = str(place.root / f"cache {budget}")
        [event] = of(events.DomainCaptured, place.capture("a", targets__bytes_per_token=budget))
        sizes.append(event.cache_bytes)
    assert sizes == sorted(set(sizes))


# More than one domain


def test_domains_that_are_captured_differently_share_the_total(place: Budgeted) -> None:
    place.write("b", ["who said hello", "where is the cat", "say hello to the mat"])
    (place.root / "b.yaml").write_text(json.dumps({"capture": {"max_tokens": 5}}))
    total = 6e-6
    seen = place.capture("a", "b", targets={"gigabytes": total})
    assert failures_of(seen) == {}
    assert sum(event.choice.gigabytes for event in of(events.BudgetChosen, seen)) <= total
    # The headers of two small shards are a larger part than those of full ones.
    assert place.shard_bytes < 1e9 * total + 2 * 1000


def test_a_run_that_is_resumed_keeps_the_threshold_of_its_total(place: Budgeted) -> None:
    place.write("b", ["who said hello", "where is the cat", "say hello to the mat"])
    place.config["targets"] = {"gigabytes": 4e-6}
    first = place.run("a", "b")
    assert first.failures == {}
    (place.out / "b" / "kd_metrics.json").unlink()
    again = place.run("a", "b")
    assert again.results["a"].unchanged
    assert len(place.identities) == 1
    assert again.captured_tokens == {"b": 0}


def test_a_domain_whose_prompts_cannot_be_rendered_fails_alone(place: Budgeted) -> None:
    place.write("b", [{"text": "h"}, {"text": "hello to the world"}])
    assert list(failures_of(place.capture("a", "b", targets={"threshold": 0.1}))) == ["b"]
    assert list(failures_of(place.capture("a", "b"))) == ["b"]


def test_domains_that_keep_different_shares_share_the_total(place: Budgeted) -> None:
    place.write("b", ["who said hello", "where is the cat", "say hello to the mat"])
    (place.root / "b.yaml").write_text(json.dumps({"targets": {"share": 0.5}}))
    total = 6e-6
    seen = place.capture("a", "b", targets__bytes_per_token=None, targets__gigabytes=total)
    assert failures_of(seen) == {}
    assert sum(event.choice.gigabytes for event in of(events.BudgetChosen, seen)) <= total
