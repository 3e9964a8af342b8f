"""`true-kd push`: what is shared of an adapter, what the card says of it, and how it reaches a hub, over real HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Ended
from hub_server import TOKEN, Hub, Repository, running_hub
from huggingface_hub import ModelCard, constants
from safetensors.numpy import load_file, save_file
from test_cli import only_line, refused
from test_pipeline import ASK, SCORED, Place

from true_kd import adapters
from true_kd.files import digest_file
from true_kd.finding import find_domain, find_folder
from true_kd.publishing import Wishes, packed
from true_kd.publishing.card import _text
from true_kd.publishing.licences import LICENCES, FoundLicence, duties, find_licence, notices, warnings
from true_kd.publishing.parcel import find_folder_of
from true_kd.report import find_finished
from true_kd.reporting import read_result

REPO = "me/brief-cats"
BASE = "mlx-community/Tiny-4bit"
SHARED = ["README.md", "adapter_config.json", "adapters.safetensors", "kd_metrics.json"]
TASKS = tuple({"prompt": f"who said hello to cat {count}", "answer": "the mat"} for count in range(6))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """The output of a run over `a`, whose replies the data brought, and `b`, where the teacher wrote them."""
    place = Place(tmp_path_factory.mktemp("published"), teacher_folder, student_folder, control="sft")
    place.config["training"] |= {"iters": 4}
    place.write("a", SCORED, TASKS)
    place.write("b", ASK, ASK)
    (place.root / "b.yaml").write_text("control: none\n")
    assert place.run("a", "b").failures == {}
    return place.out


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(out, tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that is reached as the real one is, with its token in the environment; large files go by LFS."""
    with running_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield found


@pytest.fixture
def push(cli: Callable[..., Ended], out: Path) -> Callable[..., Ended]:
    """Calls `true-kd push` for the domain a."""

    def call(*arguments: str, domain: str = "a", root: Path = out) -> Ended:
        ended = cli("push", REPO, "-d", domain, "--out", str(root), "--base-model", BASE, *arguments)
        assert TOKEN not in ended.out + ended.err
        return ended

    return call


def shared(found: Hub, branch: str = "main") -> dict[str, bytes]:
    """What lies in the repository."""
    return found.repositories[REPO].branches[branch]


# What arrives


def test_an_adapter_arrives_whole_private_and_in_one_commit(push, hub: Hub, out: Path) -> None:
    ended = push()
    assert (ended.code, ended.out) == (0, f"{hub.url}/{REPO}\n")
    assert "Private, 4 files of" in ended.err
    repository = hub.repositories[REPO]
    assert repository.is_private
    assert [commit["summary"] for commit in repository.commits] == ["Upload the adapter of a"]
    assert sorted(shared(hub)) == SHARED
    assert shared(hub)["adapters.safetensors"] == (out / "a" / "adapters.safetensors").read_bytes()
    assert hub.leaked == []


def test_what_was_shared_loads_in_mlx_lm_and_is_checked_by_its_digests(
    push, hub: Hub, out: Path, tmp_path: Path, student_folder: Path
) -> None:
    import mlx.core as mx
    from mlx_lm import load

    push()
    there = tmp_path / "there"
    there.mkdir()
    for name, content in shared(hub).items():
        (there / name).write_bytes(content)
    adapters.require_whole(there)
    config = json.loads((there / "adapter_config.json").read_text())
    assert (config["model"], config["true_kd"]["teacher"]) == (BASE, "teacher0")
    logits = []
    for folder in (there, out / "a"):
        module, _ = load(str(student_folder), adapter_path=str(folder), tokenizer_config={"trust_remote_code": False})
        logits.append(module(mx.array([[5, 6, 7]])))
    assert mx.array_equal(*logits)
    (there / "adapters.safetensors").write_bytes(shared(hub)["adapters.safetensors"][:-1] + b"\1")
    with pytest.raises(adapters.CacheError):
        adapters.require_whole(there)


def test_the_record_can_be_read_again_and_tells_no_prompt_and_no_place(
    push, hub: Hub, out: Path, tmp_path: Path
) -> None:
    push()
    there = tmp_path / "there"
    there.mkdir()
    for name, content in shared(hub).items():
        (there / name).write_bytes(content)
    result, own = read_result(there), read_result(out / "a")
    assert result is not None
    assert own is not None
    assert (result.student, result.teacher, result.domain) == (BASE, "teacher0", "a")
    assert result.proof.samples == ()
    assert own.proof.samples != ()
    assert replace(result.proof, samples=(), headroom=own.proof.headroom, prompts=own.proof.prompts) == replace(
        own.proof, samples=()
    )
    assert all(re.fullmatch(r"valid\.jsonl:\d+", where) for where in result.proof.prompts.where)
    assert find_finished(there).results == (result,)
    every = b"\n".join(content for name, content in shared(hub).items() if name != "adapters.safetensors").decode()
    for private in (str(out), str(tmp_path), str(Path.home()) + "/", "hello", "the mat", TOKEN):
        assert private not in every, private
    assert {"run.json", "checkpoint_4", "control_sft"} & set(shared(hub)) == set()


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_the_program_itself_uploads_by_either_protocol(xet: bool, out: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        command = [sys.executable, "-m", "true_kd", "push", REPO, "-d", "a", "--out", str(out), "--base-model", BASE]
        ended = subprocess.run(
            [*command, "--json"],
            env={**kept, **settings, "HF_HUB_DISABLE_XET": "0" if xet else "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (0, ""), ended
        facts = json.loads(ended.stdout)
        assert (facts["private"], facts["created"], facts["commit"]) == (
            True,
            True,
            f"{hub.url}/{REPO}/commit/{1:040x}",
        )
        weights = out / "a" / "adapters.safetensors"
        assert facts["files"]["adapters.safetensors"] == weights.stat().st_size
        digest = digest_file(weights)
        # By xet the hub is told the digest, and has the content in chunks of its own making.
        arrived = shared(hub)["adapters.safetensors"]
        assert arrived == (digest.encode() if xet else weights.read_bytes())
        assert (hub.xet_bytes > 1000) is xet
        assert TOKEN not in ended.stdout


def test_a_second_upload_goes_to_the_same_place_and_the_same_again_is_no_commit(push, hub: Hub) -> None:
    push()
    ended = push("--license", "mit", "--message", "Again", "--json")
    facts = json.loads(ended.out)
    assert (ended.code, facts["created"], facts["unchanged"], facts["private"]) == (0, False, False, True)
    ended = push("--license", "mit")
    assert (ended.code, "all of it was there before" in ended.err) == (0, True)
    assert [commit["summary"] for commit in hub.repositories[REPO].commits] == ["Upload the adapter of a", "Again"]


def test_a_branch_is_made_and_main_stays_as_it_is(push, hub: Hub) -> None:
    assert push("--revision", "rank-8").code == 0
    assert (shared(hub), sorted(shared(hub, "rank-8"))) == ({}, SHARED)
    assert push("--revision", "rank-8").code == 0


def test_public_is_only_what_was_said_to_be(push, hub: Hub) -> None:
    ended = push("--public")
    assert (ended.code, hub.repositories[REPO].is_private) == (0, False)
    assert "Public, 4 files" in ended.err
    commits = len(hub.repositories[REPO].commits)
    assert "there already, and public, expected a private repository. Give --public" in refused_after(push())
    assert len(hub.repositories[REPO].commits) == commits
    hub.repositories[REPO] = Repository(is_private=True)
    assert "It was private before and stays so" in push("--public").err


def test_a_hub_that_makes_public_what_was_to_be_private_gets_nothing(push, hub: Hub) -> None:
    hub.makes_public = True
    assert "made public by the hub" in refused_after(push())
    assert shared(hub) == {}


def refused_after(ended: Ended, code: int = 2) -> str:
    """The one line of a refusal, after the warnings."""
    assert (ended.code, ended.out) == (code, ""), ended
    *before, last = ended.err.splitlines(keepends=True)
    assert all(line.startswith("Warning: ") for line in before), ended.err
    return only_line(last)


# What goes wrong


@pytest.mark.parametrize(
    ("what", "status", "code", "says"),
    [
        ("repos/create", 401, 4, "the token is not accepted"),
        ("repos/create", 403, 4, "may not write there"),
        ("repos/create", 409, 2, "the name is taken"),
        ("repos/create", 400, 2, "refused"),
        ("repos/create", 500, 4, "the hub failed"),
        ("repos/create", 0, 4, "cannot be reached, or the connection broke"),
        ("GET /api/models", 401, 4, "the token is not accepted"),
        ("GET /api/models", 403, 4, "may not write there"),
        ("/branch/", 403, 4, "may not write there"),
        ("/preupload/", 404, 4, "not found"),
        ("/objects/batch", 413, 4, "no room there"),
        ("PUT /lfs", 403, 4, "may not write there"),
        ("/commit/", 401, 4, "the token is not accepted"),
        ("/commit/", 402, 4, "no room there"),
        ("/commit/", 403, 4, "may not write there"),
        ("/commit/", 500, 4, "the hub failed"),
        ("/commit/", 0, 4, "cannot be reached, or the connection broke"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line_and_nothing_is_there(
    what: str, status: int, code: int, says: str, push, hub: Hub
) -> None:
    hub.failures[what] = status
    line = refused_after(push("--revision", "other"), code)
    assert says in line
    is_there = REPO in hub.repositories
    assert (f"The new repository {REPO} is there, and empty." in line) is is_there
    if is_there:
        assert hub.repositories[REPO].commits == []
        assert not any(hub.repositories[REPO].branches.values())


def test_a_store_that_fails_for_a_moment_is_asked_again(push, hub: Hub, out: Path) -> None:
    hub.once["PUT /lfs"] = 0
    assert push().code == 0
    assert shared(hub)["adapters.safetensors"] == (out / "a" / "adapters.safetensors").read_bytes()
    assert sum(request.startswith("PUT /lfs") for request in hub.requests) == 2


def test_a_wrong_token_and_none_are_told_apart(push, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    assert "the token is not accepted" in refused_after(push(), 4)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    assert refused_after(push(), 4) == "hub: no token here, expected one to upload with. Run `hf auth login`."
    assert hub.requests == []


def test_without_a_network_there_is_one_line(push, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "hub: cannot be reached" in refused_after(push(), 4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on" in refused_after(push(), 4)


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_sent(push, hub: Hub) -> None:
    assert "refused" in refused_after(push("--license", "nonsense"))
    assert not any("preupload" in request or "commit" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cats"], "no owner, expected OWNER/NAME"),
        (["a/b/c"], "not a name of the hub"),
        (["../cats"], "not a name of the hub"),
        (["me/ca ts"], "not a name of the hub"),
        ([REPO, "--revision", "../main"], "--revision '../main': not the name of a branch"),
        ([REPO, "--license", "my own!"], "--license 'my own!': not an identifier"),
        ([REPO, "-d", "z"], "Domains here: a, b."),
        ([REPO, "--base-model", "pocket:student"], "--base-model 'pocket:student': embedded in true-kd"),
        ([REPO, "--base-model", "/here/model"], "--base-model '/here/model': not an id of the hub"),
        ([REPO], "not an id of the hub, expected that under which others find it. Give --base-model OWNER/NAME."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line_and_asks_no_hub(arguments: list[str], says: str, cli, hub: Hub, out: Path) -> None:
    given = arguments if "-d" in arguments else [*arguments, "-d", "a"]
    assert says in refused(cli("push", *given, "--out", str(out)))
    assert hub.requests == []


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_goes_nowhere(name: str, push, hub: Hub, copy: Path) -> None:
    path = copy / "a" / name
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"0.0", b"0.1") if name.endswith("json") else content[:-1] + bytes([content[-1] ^ 1])
    )
    assert "not the adapter that was written" in refused(push(root=copy), 5)
    assert hub.requests == []


# The dry run


def test_a_dry_run_shows_files_and_card_and_asks_nobody(push, hub: Hub, out: Path, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    ended = push("--dry-run")
    assert ended.code == 0
    first, *files = ended.out.partition("\n\n")[0].splitlines()
    assert first == f"Would upload to {REPO} (private, branch main):"
    assert sorted(line.split()[-1] for line in files) == SHARED
    size = (out / "a" / "adapters.safetensors").stat().st_size
    assert f"{size:,} bytes  adapters.safetensors" in ended.out
    facts = json.loads(push("--dry-run", "--json").out)
    assert ended.out.endswith(facts["card"])
    assert (facts["dry_run"], facts["private"], facts["files"]["adapters.safetensors"]) == (True, True, size)
    assert facts["files"]["README.md"] == len(facts["card"].encode())
    assert "\x1b" not in ended.out + ended.err
    assert hub.requests == []


# The card


def card_of(push, *arguments: str, **which: object) -> ModelCard:
    return ModelCard(json.loads(push("--dry-run", "--json", *arguments, **which).out)["card"])


def test_the_front_matter_is_what_the_hub_reads(push) -> None:
    data = card_of(push).data.to_dict()
    assert data == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "lora", "knowledge-distillation", "true-kd"],
    }
    assert card_of(push, "--license", "mit").data.license == "mit"


def test_the_card_tells_what_was_measured_and_where_it_comes_from(push, out: Path) -> None:
    text = card_of(push).text
    result = read_result(out / "a")
    proof = result.proof
    assert _text(proof.verdict.sentence) in text
    assert "| | student | this adapter | SFT control | teacher |" in text
    [kl] = [line for line in text.splitlines() if line.startswith("| KL to the teacher")]
    cells = [cell.strip() for cell in kl.split("|")[2:-1]]
    for cell, model in zip(cells, (proof.student, proof.adapted, proof.control, proof.teacher), strict=True):
        assert float(cell.split()[0]) == pytest.approx(model.kl.value, abs=0.051)
    assert f"{result.data.train_examples} prompts for training and {result.data.valid_examples} held out" in text
    assert "the data brought all of them, by whoever wrote them" in text
    assert "- Teacher: `teacher0`." in text
    assert f"- Student: [{BASE}](https://huggingface.co/{BASE})." in text
    assert re.search(r"Made with true-kd [\d.]+, mlx [\d.]+, mlx-lm [\d.]+", text)
    assert f'load("{BASE}", adapter_path=snapshot_download("{REPO}"))' in text
    assert text.count("not legal advice") == 1
    teacher_wrote = card_of(push, domain="b").text
    assert "- Replies: the teacher wrote all of them." in teacher_wrote
    assert "SFT control" not in teacher_wrote


def test_who_wrote_the_replies_is_not_guessed(push, copy: Path, tmp_path: Path) -> None:
    run = json.loads((copy / "a" / "run.json").read_text())
    prompts = Path(shutil.copytree(run["prompts"], tmp_path / "prompts"))
    (copy / "a" / "run.json").write_text(json.dumps({**run, "prompts": str(prompts)}))
    assert "the data brought" in card_of(push, root=copy).text
    with (prompts / "a" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert "- Replies: who wrote them was not recorded." in card_of(push, root=copy).text
    shutil.rmtree(prompts)
    assert "- Replies: who wrote them was not recorded." in card_of(push, root=copy).text


def test_a_system_message_is_told_of_and_not_told(push, copy: Path, tmp_path: Path) -> None:
    run = json.loads((copy / "a" / "run.json").read_text())
    prompts = Path(shutil.copytree(run["prompts"], tmp_path / "prompts"))
    (prompts / "a" / "system.md").write_text("the secret of the house")
    (copy / "a" / "run.json").write_text(json.dumps({**run, "prompts": str(prompts)}))
    text = card_of(push, root=copy).text
    assert "a system message of 23 characters, which is not published here" in text
    assert "secret of the house" not in text


def test_names_are_no_markup(push, copy: Path) -> None:
    assert _text("a|b <img src=x>\n# c `d` [e](f)") == r"a\|b \<img src=x\> \# c \`d\` \[e\](f)"
    assert TOKEN not in _text(f"by {TOKEN}")


def test_a_control_is_not_said_to_be_distilled(cli, out: Path) -> None:
    folder = str(out / "a" / "control_sft")
    ended = cli("push", REPO, "--adapter", folder, "--base-model", BASE, "--dry-run", "--json")
    card = ModelCard(json.loads(ended.out)["card"])
    assert "knowledge-distillation" not in card.data.tags
    assert "fine-tuned on the text of `teacher0`" in card.text


def test_an_adapter_of_mlx_lm_goes_without_its_command_line(cli, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(out / "a" / "adapters.safetensors", folder)
    config = json.loads((out / "a" / "adapter_config.json").read_text())
    del config["true_kd"]
    config |= {"adapter_path": str(folder), "data": "/home/somebody/data", "hf_token": TOKEN, "model": BASE}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with packed(find_folder(str(folder)), Wishes(REPO)) as parcel:
        assert parcel.names == ("README.md", "adapters.safetensors", "adapter_config.json")
        shared_config = json.loads((parcel.folder / "adapter_config.json").read_text())
        assert set(shared_config) == {"fine_tune_type", "num_layers", "lora_parameters", "model"}
        assert "Nothing was measured of these weights." in parcel.card
        assert "- Teacher: not recorded." in parcel.card


def test_measurements_of_other_weights_stay_here(push, copy: Path) -> None:
    (copy / "a" / "kd_metrics.json").write_text("{}")
    ended = push("--dry-run", root=copy)
    assert "kd_metrics.json is not of these weights, and stays here" in ended.err
    assert "kd_metrics.json" not in ended.out
    assert "Nothing was measured of these weights." in ended.out


def test_a_checkpoint_is_shared_without_the_measurements_of_another_step(cli, out: Path) -> None:
    with packed(find_folder(str(out / "a" / "checkpoint_4")), Wishes(REPO, BASE)) as parcel:
        assert "kd_metrics.json" not in parcel.names
        assert "Nothing was measured of these weights." in parcel.card


# Secrets and places


def test_the_report_goes_only_where_it_is_asked_for_and_tells_no_place(push, hub: Hub, out: Path) -> None:
    ended = push("--with-report")
    assert "report.html shows held-out prompts and replies: they go with it." in ended.err
    page = shared(hub)["report.html"].decode()
    assert sorted(shared(hub)) == sorted([*SHARED, "report.html"])
    assert str(out) not in page
    assert str(out.parent) not in page


def test_a_secret_in_a_setting_stops_it_all(push, hub: Hub, copy: Path) -> None:
    path = copy / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(adapters.signed(config, {**config["true_kd"], "note": TOKEN})))
    assert "adapter_config.json: holds what looks like a secret" in refused_after(push(root=copy))
    path.write_text(json.dumps(adapters.signed(config, {**config["true_kd"], "note": f"{copy}/a"})))
    assert "adapter_config.json: would tell of" in refused_after(push(root=copy))
    assert hub.requests == []


def test_a_secret_in_the_header_of_the_weights_stops_it_as_well(cli, hub: Hub, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    tensors = load_file(out / "a" / "adapters.safetensors")
    save_file(tensors, folder / "adapters.safetensors", metadata={"made_by": f"train --token {TOKEN}"})
    config = json.loads((out / "a" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "model": BASE, "true_kd": None}))
    arguments = ("push", REPO, "--adapter", str(folder), "--base-model", BASE)
    assert "adapters.safetensors: holds what looks like a secret" in refused_after(cli(*arguments))
    assert hub.requests == []


# Licences


@pytest.mark.parametrize(
    ("front", "found", "source"),
    [
        ("license: mit", "mit", "by its model card"),
        ("license: [apache-2.0]", "apache-2.0", "by its model card"),
        ("license: other\nlicense_name: qwen-research", "qwen-research", "by its model card"),
        ("license_name: tongyi-qianwen\nlicense: other", "qwen", "by its model card"),
        ("base_model: meta-llama/Llama-3.2-1B-Instruct", "llama3.2", "by the name of its family, not looked up"),
        ("license: 5", None, ""),
        ("license: '<script>'", None, ""),
        ("license: [", None, ""),
        ("- a list", None, ""),
        (f"a: {'[' * 5000}", None, ""),
    ],
)
def test_a_model_card_on_this_machine_tells_the_licence(
    front: str, found: str | None, source: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\nA model.\n")
    licence = find_licence(str(tmp_path), tmp_path)
    assert licence.id == found
    assert found is None or licence.source == source


def test_the_card_of_a_downloaded_model_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--Best-7B"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    assert find_folder_of("somebody/Best-7B", None) == snapshot
    (snapshot / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert find_licence("somebody/Best-7B", find_folder_of("somebody/Best-7B", None)).id == "gemma"
    assert find_folder_of("somebody/Other-7B", None) is None
    assert find_folder_of(None, None) is None


@pytest.mark.parametrize(
    ("opening", "found"),
    [
        ("Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright", "mit"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version", "llama3.1"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("Qwen RESEARCH LICENSE AGREEMENT", "qwen-research"),
        ("Qwen LICENSE AGREEMENT", "qwen"),
        ("All rights reserved.", None),
    ],
)
def test_without_a_card_the_licence_file_tells_it(opening: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(opening)
    assert find_licence(str(tmp_path), tmp_path).id == found


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("mlx-community/Qwen2.5-3B-Instruct-4bit", "qwen-research"),
        ("mlx-community/Qwen2.5-Coder-3B-Instruct-4bit", "qwen-research"),
        ("mlx-community/Qwen2.5-7B-Instruct-4bit", "apache-2.0"),
        ("mlx-community/Qwen2.5-72B-Instruct-4bit", "qwen"),
        ("mlx-community/Qwen3-0.6B-4bit", "apache-2.0"),
        ("mlx-community/Meta-Llama-3-8B-Instruct-4bit", "llama3"),
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "llama3.1"),
        ("mlx-community/Llama-3.2-1B-Instruct-4bit", "llama3.2"),
        ("mlx-community/Llama-3.3-70B-Instruct-4bit", "llama3.3"),
        ("mlx-community/Llama-4-Scout-17B-16E-Instruct-4bit", "llama4"),
        ("mlx-community/Llama-2-7b-chat-4bit", "llama2"),
        ("mlx-community/gemma-3-4b-it-4bit", "gemma"),
        ("mlx-community/gemma-4-9b-it-4bit", None),
        ("mlx-community/Ministral-8B-Instruct-2410-4bit", "mrl"),
        ("somebody/Best-7B", None),
        ("pocket:teacher", "apache-2.0"),
    ],
)
def test_a_family_is_known_by_its_name_and_a_stranger_is_not(model: str, found: str | None) -> None:
    assert find_licence(model, None).id == found


def licence(name: str | None) -> FoundLicence:
    return FoundLicence(name, "by its model card")


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen-research", "gemma", "mrl", "tencent-hunyuan-community"])
def test_a_teacher_whose_licence_restricts_distillation_is_warned_of(name: str) -> None:
    told = warnings(licence(name), licence("mit"), "me/Llama-3-cats")
    assert any("restricts distillation" in line for line in told)
    assert LICENCES[name].restricts in " ".join(duties(licence(name), licence("mit")))


def test_what_a_licence_asks_is_on_the_card_and_in_the_warnings() -> None:
    assert notices(licence("llama3.1"), licence("qwen"))[0] == "Built with Llama."
    assert "Built with Qwen." in notices(licence("llama3.1"), licence("qwen"))
    for name, repo, warned in (
        ("llama3.2", "me/cats", True),
        ("llama3.2", "me/Llama-cats", False),
        ("mit", "me/cats", False),
    ):
        assert (
            any("has to begin with Llama" in line for line in warnings(licence(name), licence("mit"), repo)) is warned
        )
    assert notices(licence("mit"), licence("apache-2.0")) == duties(licence("mit"), licence("apache-2.0")) == []
    assert warnings(licence("mit"), licence("apache-2.0"), REPO) == []
    assert "holds for its adapters" in warnings(licence("mit"), licence("qwen-research"), REPO)[0]
    assert LICENCES["qwen-research"].restricts in duties(licence("mit"), licence("qwen-research"))[0]
    assert duties(licence("mit"), licence("llama2")) == [], "of outputs, and it is no teacher here"
    for own, warned in (("mit", True), ("gemma", False), (None, False)):
        told = warnings(licence("mit"), licence("gemma"), REPO, own)
        assert any("holds for its adapters as well" in line for line in told) is warned


def test_what_is_not_known_is_said_to_be_not_known(push) -> None:
    ended = push("--dry-run")
    assert "Warning: The teacher's licence is not known" in ended.err
    assert "Warning: The student's licence is not known" in ended.err
    assert "- Teacher: not known (no model card or licence file of it is here)." in ended.out
    assert warnings(licence("own-terms-9"), licence("mit"), REPO)[0].startswith(
        "What the teacher's licence own-terms-9"
    )


def test_a_restricted_teacher_is_marked_on_card_and_terminal(cli, copy: Path, tmp_path: Path) -> None:
    run = json.loads((copy / "b" / "run.json").read_text())
    teacher = Path(shutil.copytree(run["teacher"]["model"], tmp_path / "gemma"))
    (teacher / "README.md").write_text("---\nlicense: gemma\n---\n")
    result = read_result(copy / "b")
    found = find_domain("b", str(copy))
    from true_kd.reporting import write_result

    write_result(copy / "b", replace(result, teacher=str(teacher)), "x")
    with packed(found, Wishes("me/cats", BASE)) as parcel:
        assert any("(Gemma Terms of Use) restricts distillation" in line for line in parcel.warnings)
        assert "**The teacher's licence restricts distillation" in parcel.card
        assert "Gemma is provided under and subject to the Gemma Terms of Use" in parcel.card
        assert str(tmp_path) not in parcel.card
